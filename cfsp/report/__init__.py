"""What was pruned and measured, as one HTML page, as pictures, as tables."""
