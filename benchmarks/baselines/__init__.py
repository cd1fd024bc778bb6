"""What mope_fast is compared with, one file per op."""
