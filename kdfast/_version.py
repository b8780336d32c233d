"""The version, for packaging and for the files that a cache writes."""

__version__ = "0.1.0"
