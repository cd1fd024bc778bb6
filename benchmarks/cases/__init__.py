"""What is measured, one file per kind of op: sizes, with the bytes and operations they can't do without."""

MODES = ("forward", "forward+backward")
SMOKE, CENTRE, FULL = "smoke", "centre", "full"
"""How much is measured: tiny sizes, to see that it runs; one size of every group, in minutes; all sizes."""
