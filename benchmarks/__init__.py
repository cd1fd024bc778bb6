"""Speed and memory of mope_fast beside the forms it replaces: see README.md."""
