"""Tasks that test one ability each, on data made on the fly: MAD, RegBench, recall, needles and copying."""
