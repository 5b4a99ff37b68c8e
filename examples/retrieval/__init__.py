"""A Llama checkpoint whose weights are computed so that it retrieves exactly, with no training."""
