"""Compression methods, one file each; importing the package fills the table of methods."""

from vitoats.methods import oats as _oats  # noqa: F401
