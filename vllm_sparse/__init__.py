"""Dynamic sparse attention for long contexts on ordinary models, as a vLLM plugin.

Importing this package loads neither torch nor vLLM: vLLM's entry point does that when it needs to.
"""

__version__ = "0.1.0"
