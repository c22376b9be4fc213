"""Device code, installed as `fastinv.kernels`. It takes tensors and integers, and knows nothing of networks."""
