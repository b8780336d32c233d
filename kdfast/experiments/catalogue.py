"""The experiments by name, and which arms each has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kdfast.experiments.arms import CONTROLS, FEATURES, LOSSES, PLAIN, TEACHER, UPPER_BOUND, Arm
from kdfast.experiments.arms_recipes import CHAINS, DOMAIN_SHIFT, RECIPES, SELF_TAUGHT
from kdfast.experiments.tasks import Task, domain_shift, few_labels_digits, few_labels_mnist, label_noise
from kdfast.experiments.text import few_characters

__all__ = ["EXPERIMENTS", "FEW_CHARACTERS", "FEW_LABELS", "LABEL_NOISE", "Experiment"]

_ALL = (*CONTROLS, *PLAIN, *LOSSES, *FEATURES, *RECIPES, *SELF_TAUGHT, *CHAINS)
_BOUNDS = (UPPER_BOUND, TEACHER)
# Teacher and student have the same labels, and the student all images, so that some arms would equal others.
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


# ---- experiments ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared on one task.

    Attributes:
        name: its key in results and on the command line.
        title: its name in the report.
        task: ``task(seed, settings, validation=...)`` makes the task of a seed.
        arms: in the report's order.
        references: the names of the arms that the others are compared with, the plainest first.
        notes: what a reader must know before quoting a number.
        tuned: whether options are chosen on the validation split; if not, every arm's first candidate is taken.
    """

    name: str
    title: str
    task: Callable[..., Task]
    arms: tuple[Arm, ...]
    references: tuple[str, ...]
    notes: tuple[str, ...]
    tuned: bool = True


_TEACHER = (
    "The teacher was trained on all {train} training labels: whatever learns from it gets knowledge that {labels} "
    "labels do not hold. Label smoothing and the teacher that knows only the student's labels are the controls."
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "few-labels-digits",
            "Few labels: digits, 60 of 1200 training images labelled",
            few_labels_digits,
            FEW_LABELS,
            ("no_kd", "kd"),
            (_TEACHER.format(train=1200, labels=60),),
        ),
        Experiment(
            "few-labels-mnist",
            "Few labels: MNIST-5k at 8 x 8, 100 of 4000 training images labelled",
            few_labels_mnist,
            FEW_LABELS,
            ("no_kd", "kd"),
            (_TEACHER.format(train=4000, labels=100),),
        ),
        Experiment(
            "domain-shift",
            "Domain shift: MNIST-5k with labels, digits without",
            domain_shift,
            DOMAIN_SHIFT,
            ("source_only", "kd_all"),
            (
                "No option was tuned, as there is no target label to tune by. Target labels serve the final score and "
                "the upper bound alone.",
                "The teacher has seen no target image: a student that is as good there has learned all that it says.",
            ),
            tuned=False,
        ),
        Experiment(
            "label-noise",
            "Label noise: digits, 30 % of the 1200 training labels wrong",
            label_noise,
            LABEL_NOISE,
            ("no_kd",),
            ("The teacher was trained on the same wrong labels. The validation split has right ones.",),
        ),
        Experiment(
            "few-characters",
            "Few labels, of text: the next character, 2000 labels",
            few_characters,
            FEW_CHARACTERS,
            ("no_kd", "kd"),
            (
                "The text is Python's help topics. The teacher counts n-grams in all 325,526 training windows: what "
                "learns from it gets knowledge that 2000 labels do not hold. The student is an MLP of 30,577 "
                "parameters.",
            ),
        ),
    )
}
