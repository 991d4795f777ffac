"""Benchmarks of the fused kernels: one module an op, timed by `harness.py`, run by `run.py`."""
