"""From text to statistics: token windows, one dense forward pass over each block, sums and Gram
matrices of the FFN activations."""
