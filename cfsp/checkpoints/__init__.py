"""Pruned folders: written whole, reloaded and compared, documented, resumed and exported."""
