"""Measurements: `python -m benchmarks NAME`; nothing here is needed at run time."""
