"""Tasks that test one ability each, on data made on the fly: MAD, RegBench, and sweeps over them."""
