"""The families of today, each as a tiny checkpoint in the hub's own naming."""
