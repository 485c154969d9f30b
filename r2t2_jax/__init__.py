"""R2-T2: a frozen mixture of experts whose routing adapts to each input at test time (arXiv 2502.20395)."""
