"""The three attacks of the paper, in plain PyTorch."""
