"""Attention on a CPU: building the C++ library of :mod:`flashlib.kernels.cpu`, loading it, and calling it as PyTorch operators."""
