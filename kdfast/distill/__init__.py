"""The trainer: a student, its teachers and an objective, from the first batch to the best checkpoint::

distiller = kdfast.Distiller(student, teacher, temperature=2.0, kd_weight=0.5, ce_weight=0.5)
history = distiller.fit(loader, epochs=20, eval_loader=test)
"""

from kdfast.distill.checkpoint import CheckpointError, load_best
from kdfast.distill.distiller import Distiller
from kdfast.distill.evaluation import Footprint, evaluate, footprint
from kdfast.distill.freezing import freeze
from kdfast.distill.log import plot_curves
from kdfast.distill.objective import KD
from kdfast.distill.optimizer import constant, cosine, inverse_decay
from kdfast.distill.step import Objective, Step

__all__ = [
    "KD",
    "CheckpointError",
    "Distiller",
    "Footprint",
    "Objective",
    "Step",
    "constant",
    "cosine",
    "evaluate",
    "footprint",
    "freeze",
    "inverse_decay",
    "load_best",
    "plot_curves",
]
