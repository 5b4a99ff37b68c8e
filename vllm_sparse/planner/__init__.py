"""From queries, keys and head patterns to the keys each query tile reads."""

from .plan import plan_prefill

__all__ = ["plan_prefill"]
