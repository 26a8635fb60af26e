"""TIR kernels for NVIDIA GPUs: fragment-order weights, one prelude of PTX instructions."""
