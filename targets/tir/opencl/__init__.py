"""Ternary kernels as TIR for OpenCL devices: one generator, one schedule a target."""
