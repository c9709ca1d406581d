"""Device code for Hopper GPUs: warp-specialised kernels in Gluon, and those in Triton that prepare for them."""
