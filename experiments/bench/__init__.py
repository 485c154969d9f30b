"""The operators against a yardstick in PyTorch, and how memory and decoding grow: python -m experiments.bench."""
