"""The teacher, the student, and a fingerprint of either."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor, nn

from kdfast.demo.data import CLASSES

__all__ = ["build", "fingerprint", "logits_of", "parameters", "student", "teacher"]


def student() -> nn.Module:
    """64-16-10: 1210 parameters."""
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def teacher() -> nn.Module:
    """A small CNN: 151,306 parameters."""
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
    """``make()`` with the initial weights of ``seed``, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fingerprint(model: nn.Module) -> str:
    """A digest of the weights: two models with one fingerprint give the same soft labels."""
    digest = blake2b(digest_size=6)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(rows, 10) logits of the model as it answers after training."""
    was_training = model.training
    try:
        return model.eval()(images)
    finally:
        model.train(was_training)
