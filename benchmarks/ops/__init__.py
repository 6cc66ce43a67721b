"""Kernels and operations: measured, compiled for every target, tuned."""
