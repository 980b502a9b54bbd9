"""What every op shares: choosing a backend, checking tensors, tiles and documents, compiling kernels."""
