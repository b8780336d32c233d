"""kdfast: fused distillation losses, and a compressed cache of the teacher's soft labels.

``import kdfast`` loads the losses. The cache, the trainer and the recipes are loaded when they are first used.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

import torch as _torch  # noqa: F401  (loads the libraries that the extension links)

from kdfast import _C
from kdfast._optional import lazy_attributes as _lazy_attributes
from kdfast._version import __version__
from kdfast.divergences import Divergence, alpha_beta, dkd, jsd, skew_forward_kl, skew_reverse_kl
from kdfast.labels import Head, OutputLayer, SoftLabels
from kdfast.loss.data_parallel import global_items
from kdfast.loss.kd_loss import KDLoss, LossParts, kd_loss

if _TYPE_CHECKING:
    from kdfast import cache, distill, objectives, recipes
    from kdfast.cache import PackedLabels
    from kdfast.distill import Distiller

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
    "distill",
    "dkd",
    "global_items",
    "jsd",
    "kd_loss",
    "objectives",
    "recipes",
    "skew_forward_kl",
    "skew_reverse_kl",
]

__getattr__ = _lazy_attributes(
    __name__,
    {
        "Distiller": "kdfast.distill",
        "PackedLabels": "kdfast.cache",
        **{room: f"kdfast.{room}" for room in ("cache", "distill", "head", "losses", "objectives", "recipes")},
    },
)

try:
    _C.cpu_isa()  # a wrong KDFAST_CPU_ISA is an error here, not in the middle of a training step
except RuntimeError as error:
    raise ValueError(str(error)) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
