"""A pruned folder: written whole, documented, verified after reloading, resumed, exported to other
runtimes."""
