"""FFNs: where their channels lie, how they are observed, how they are cut."""
