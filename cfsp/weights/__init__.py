"""The tensors of a checkpoint as a model takes them: dequantised, under its names, and back."""
