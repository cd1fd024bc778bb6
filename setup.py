"""All metadata is in pyproject.toml; the folder map of the package is there too."""

from setuptools import setup

setup()
