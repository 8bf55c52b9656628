"""Packaging entry; everything declarative stands in pyproject.toml."""

from setuptools import setup

setup()
