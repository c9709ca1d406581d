"""Device code, and nothing else: Triton and Gluon kernels, and the C++ of the processor. What plans and starts them is :mod:`flashlib.launch`."""
