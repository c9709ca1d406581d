"""From tensors to kernels: what is planned, built and started for a call."""
