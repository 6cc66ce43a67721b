"""Whole jobs: calibration, the second pass, memory, end to end, speed of the result."""
