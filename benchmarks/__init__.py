"""Speed and memory of mope_fast compared with the forms that it replaces: see README.md."""
