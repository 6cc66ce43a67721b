"""Models of transformers: where a family keeps its blocks and FFNs (layouts, detection), one way to
open any of them, blocks in memory or on disk, the classes that reload a pruned one."""
