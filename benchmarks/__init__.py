"""Measurements beside rivals; every script runs as `python -m benchmarks.NAME --help`."""
