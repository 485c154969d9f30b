"""Experiments on R2-T2: one file, one experiment."""
