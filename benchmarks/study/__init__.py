"""A study of when each way of fusing two frozen encoders pays off. ``python -m benchmarks.study``."""
