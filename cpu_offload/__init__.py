"""Sampled attention over key-value blocks in host memory."""
