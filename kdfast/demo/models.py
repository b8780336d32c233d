"""The networks of teacher and student, their initial weights, and a fingerprint of the weights."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor, nn

from kdfast.demo.data import CLASSES

__all__ = ["build", "fingerprint", "logits_of", "parameters", "student", "teacher"]


def student() -> nn.Module:
    """Make the student: an MLP 64-16-10 with 1210 parameters."""
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def teacher() -> nn.Module:
    """Make the teacher: a small CNN with 151,306 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def build(make: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    """Make a model with the initial weights of ``seed``. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)


def parameters(model: nn.Module) -> int:
    """The number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's weights. Models with the same fingerprint give the same soft labels."""
    digest = blake2b(digest_size=6)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(rows, 10) logits of a model in evaluation mode, without gradients."""
    was_training = model.training
    try:
        return model.eval()(images)
    finally:
        model.train(was_training)
