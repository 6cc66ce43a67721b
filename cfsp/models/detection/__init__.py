"""What a model shows of where its parts are and whether they can be cut: tried on random values."""
