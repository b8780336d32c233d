"""What a loss compares a student with: a teacher's soft labels, and output layers that make logits of hidden states."""

from kdfast.labels.floor import Floor
from kdfast.labels.head import Head, OutputLayer
from kdfast.labels.ragged import Prototype, Ragged, TopK, Weights
from kdfast.labels.soft_labels import SoftLabels
from kdfast.labels.whole import Dense, Hidden, Whole

__all__ = [
    "Dense",
    "Floor",
    "Head",
    "Hidden",
    "OutputLayer",
    "Prototype",
    "Ragged",
    "SoftLabels",
    "TopK",
    "Weights",
    "Whole",
]
