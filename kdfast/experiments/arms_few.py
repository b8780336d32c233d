"""The arms of few labels and of label noise."""

from __future__ import annotations

from kdfast.experiments.arms_chains import CHAINS, SELF_TAUGHT
from kdfast.experiments.arms_losses import FEATURES, LOSSES
from kdfast.experiments.arms_plain import CONTROLS, PLAIN, TEACHER, UPPER_BOUND
from kdfast.experiments.arms_recipes import RECIPES

__all__ = ["FEW_CHARACTERS", "FEW_LABELS", "LABEL_NOISE"]

_ALL = (*CONTROLS, *PLAIN, *LOSSES, *FEATURES, *RECIPES, *SELF_TAUGHT, *CHAINS)
_BOUNDS = (UPPER_BOUND, TEACHER)
# Teacher and student have the same labels, and the student all images: some arms would be others once more.
_NOISE = (
    *("no_kd", "smoothing", "kd", "kd_all", "pseudo_labels", "reverse_kl", "jsd", "ls_kd", "logit_mse", "ensemble"),
    *("ensemble_all", "mutual", "co_training", "hard_examples", "focal", "annealed", "confidence", "ema", "growth"),
)
_TEXT = (
    *("no_kd", "smoothing", "kd_own", "kd", "kd_all", "pseudo_labels", "reverse_kl", "jsd", "logit_mse", "mutual"),
    *("hard_examples", "annealed", "ema"),
)

FEW_LABELS = (*_ALL, *_BOUNDS)
LABEL_NOISE = (*(arm for arm in _ALL if arm.name in _NOISE), *_BOUNDS)
FEW_CHARACTERS = (*(arm for arm in _ALL if arm.name in _TEXT), *_BOUNDS)
