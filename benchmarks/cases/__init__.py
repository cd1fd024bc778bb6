"""What is measured, one file per kind of op: sizes, with the bytes and operations they can't do without."""

MODES = ("forward", "forward+backward")
