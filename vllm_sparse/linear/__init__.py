"""Flat GEMM under vLLM's linear layers, and the choice between it and vLLM's own by rows.

FlashDecoding++ (arXiv 2311.01282, section 5, "heuristic dataflow"): which implementation is fastest
depends on the number of rows and on the layer's shape, so both are timed once, for each shape, on
the machine that serves.
"""
