"""What a loss compares a student with: a teacher's soft labels, and output layers that make logits of hidden states."""

from kdfast.labels.head import Head, OutputLayer
from kdfast.labels.soft_labels import SoftLabels

__all__ = ["Head", "OutputLayer", "SoftLabels"]
