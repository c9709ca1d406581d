"""Device code, and nothing else: Triton kernels and the small helpers they are made of. Nothing of flashlib is imported here."""
