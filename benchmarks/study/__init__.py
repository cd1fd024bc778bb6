"""When does which way of fusing two frozen encoders pay? ``python -m benchmarks.study``."""
