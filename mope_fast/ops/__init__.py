"""Registered torch ops: schema, fake and CPU implementations, Triton launches, autograd. One file per op."""
