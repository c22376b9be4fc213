"""Triton kernels: one file a family of ops, kernel -> launcher.

Images lie with their channels last, [N, H, W, C]. A launcher checks nothing and launches nothing: it gives a `Launch`,
which runs as often as it is called, also while a CUDA graph is captured.
Offsets are 32-bit: no tensor has 2^31 elements or more.
"""
