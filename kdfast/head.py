"""``Head`` and ``OutputLayer``, at the path that they had before 0.2."""

from kdfast.labels.head import Head, OutputLayer

__all__ = ["Head", "OutputLayer"]
