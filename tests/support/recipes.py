"""Small models, data and steps that the recipes' tests share."""

import torch
from torch import nn

from kdfast.distill import Step

CLASSES = 5


def make_step(rows=6, classes=CLASSES, teachers=1, labels=True, **fields):
    """A ``Step`` of random float64 logits, of which the student's are a leaf that requires grad."""
    student = torch.randn(rows, classes, dtype=torch.float64, requires_grad=True)
    outputs = tuple(2 * torch.randn(rows, classes, dtype=torch.float64) for _ in range(teachers))
    truth = torch.randint(classes, (rows,)) if labels else None
    return Step(student, outputs[0] if teachers == 1 else outputs, truth, **fields)


def gradient(loss, *leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)


def mlp(width=4, hidden=8, classes=3):
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def blobs(samples=48, width=4, classes=3, shift=0.0, seed=0):
    """Gaussians around a corner per class, which can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    inputs = torch.randn(samples, width, generator=generator) * 0.5 + 2.0 * torch.eye(classes, width)[labels] + shift
    return inputs, labels


def batches(inputs, labels, size=16):
    return list(zip(inputs.split(size), labels.split(size), strict=True))


class Counting(nn.Module):
    """A teacher that counts how often it is asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, inputs):
        self.calls += 1
        return self.model(inputs)


def recorded(model, log, name):
    """The model, which at every call appends to ``log`` its ``name`` and whether it is in training mode."""
    model.register_forward_pre_hook(lambda module, arguments: log.append((name, module.training)))
    return model


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


def accuracy(model, inputs, labels):
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())
