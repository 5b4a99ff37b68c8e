"""Triton kernels over vLLM's paged KV cache: one file for each, and the launch table of all."""
