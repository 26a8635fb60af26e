"""Ternary kernels as TIR, written once for every CPU, and their compilation."""
