"""Files: safetensors read and written by the block, hashes, JSON."""
