"""Triton device code and its launch tables, installed as ``mope_fast.kernels``; everything else lives in ``mope_fast.ops``."""
