"""Sizes to measure, one file per kind of op, with the compulsory bytes and operations of each."""

MODES = ("forward", "forward+backward")
SMOKE, CENTRE, FULL = "smoke", "centre", "full"
"""How much is measured: tiny sizes, to check that it runs; one size of every group, in minutes; all sizes."""
