"""What goes whole, and is chosen first: blocks, and experts."""
