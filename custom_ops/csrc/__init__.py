"""C sources of the ONNX Runtime plugin, compiled with each target's kernels."""
