"""Benchmarks, run by name from a checkout: `python -m benchmarks.NAME --json FILE`."""
