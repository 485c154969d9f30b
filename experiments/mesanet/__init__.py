"""Experiments on MesaNet: one file, one experiment."""
