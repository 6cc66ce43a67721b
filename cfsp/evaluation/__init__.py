"""What a model is worth: perplexity on held-out text, speed of generation, tasks of the
lm-evaluation-harness."""
