"""What the arms are given, seed by seed: labels, inputs, teachers, tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor, nn

from kdfast.demo import data, models
from kdfast.experiments.corruptions import CORRUPTIONS, flip_labels
from kdfast.experiments.mnist import load_mnist
from kdfast.experiments.settings import Settings
from kdfast.experiments.training import Remembered, fit

__all__ = ["CLEAN", "Task", "domain_shift", "few_labels_digits", "few_labels_mnist", "label_noise"]

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
