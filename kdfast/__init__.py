"""kdfast: fused distillation losses, and a compressed cache of the teacher's soft labels."""

import torch as _torch  # noqa: F401  (loads the libraries that the extension links)

from kdfast import _C, cache, recipes
from kdfast._version import __version__
from kdfast.cache.packed import PackedLabels
from kdfast.data_parallel import global_items
from kdfast.distill import Distiller
from kdfast.divergences import Divergence, alpha_beta, dkd, jsd, skew_forward_kl, skew_reverse_kl
from kdfast.head import Head, OutputLayer
from kdfast.labels import SoftLabels
from kdfast.losses import KDLoss, LossParts, kd_loss

__all__ = [
    "Distiller",
    "Divergence",
    "Head",
    "KDLoss",
    "LossParts",
    "OutputLayer",
    "PackedLabels",
    "SoftLabels",
    "__version__",
    "alpha_beta",
    "cache",
    "dkd",
    "global_items",
    "jsd",
    "kd_loss",
    "recipes",
    "skew_forward_kl",
    "skew_reverse_kl",
]

_C.cpu_isa()  # a wrong KDFAST_CPU_ISA is an error here, not in the middle of a training step
