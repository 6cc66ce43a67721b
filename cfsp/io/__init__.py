"""Files: safetensors read and written, blocks read ahead, hashes, output that appears whole or not
at all. Knows nothing of models."""
