"""Tests of cfsp.weights, and tiny quantised checkpoints for tests elsewhere."""
