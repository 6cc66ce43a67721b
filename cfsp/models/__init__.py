"""Models: how they are opened, where their blocks and FFNs are, and what a pruned one is."""
