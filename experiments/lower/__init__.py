"""What the TPU compiler says a kernel costs, on a host without a TPU."""
