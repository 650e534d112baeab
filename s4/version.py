"""The version of s4."""

__version__ = "0.2.0"
