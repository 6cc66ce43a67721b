"""Perplexity of recipes and of recovery."""
