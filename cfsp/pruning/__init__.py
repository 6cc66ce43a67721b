"""The method: recipe, scores of channels, widths under a budget, the plan, compensation for what is
removed, and the cut, in memory or from shard to shard."""
