"""What benchmarks share: measuring, shapes, the environment of a result."""
