"""Any layout of numbers and masks, with and without shift, against plain PyTorch on hand-shifted float64 tensors."""

import random

import pytest
import torch
import torch.nn.functional as F

from kdfast.testing import loss_and_gradient

VOCAB = 5


def numbers(draw, batch, length, shift):
    """A number as kd_loss takes it, and the (batch, length) that it stands for."""
    kind = draw.choice(["float", "0-d", "one", "per sample", "per position", "per row", "kept", "shorter"])
    if kind in ("float", "0-d", "one"):
        value = draw.uniform(0.5, 2.0)
        full = torch.full((batch, length), value, dtype=torch.float64)
        return {"float": value, "0-d": torch.tensor(value, dtype=torch.float64), "one": full[:1, :1]}[kind], full
    shape = {"per sample": (batch, 1), "per position": (1, length)}.get(kind, (batch, length))
    value = torch.rand(shape, dtype=torch.float64) + 0.5
    full = value.expand(batch, length)
    if kind == "kept":
        value = value[..., None]
    return value[:, :-1] if kind == "shorter" and shift and length > 1 else value, full


def row_weights(draw, batch, length, shift):
    """A row_weight, the mask of labels and the weights of positions that it stands for."""
    weight, mask = torch.ones(batch, length, dtype=torch.float64), torch.ones(batch, length, dtype=torch.bool)
    kind = draw.choice(["nothing", "mask", "shorter mask", "weights", "shorter weights"])
    shorter = kind.startswith("shorter") and shift and length > 1
    if kind.endswith("mask"):
        mask = torch.rand(batch, length) < 0.6
        given = mask.to(draw.choice([torch.bool, torch.int64, torch.int32, torch.uint8]))
        return given[:, 1:] if shorter else given, mask, weight
    if kind.endswith("weights"):
        weight = torch.rand(batch, length, dtype=torch.float64)
        return weight[:, :-1] if shorter else weight, mask, weight
    return None, mask, weight


@pytest.mark.parametrize("seed", range(150))
def test_any_layout(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, length, shift = draw.randint(1, 3), draw.randint(1, 4), draw.random() < 0.6
    student, teacher = torch.randn(2, batch, length, VOCAB, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (batch, length)).masked_fill(torch.rand(batch, length) < 0.2, -100)
    (tau, taus), (kd_weight, kds), (ce_weight, ces) = (numbers(draw, batch, length, shift) for _ in range(3))
    row_weight, mask, weights = row_weights(draw, batch, length, shift)
    reduction = draw.choice(["mean", "sum", "none"])

    ours = loss_and_gradient(
        student, teacher, labels, temperature=tau, kd_weight=kd_weight, ce_weight=ce_weight, row_weight=row_weight,
        shift=shift, reduction=reduction,
    )  # fmt: skip

    end = length - shift
    taus, kds, ces, weights, t = (x[:, :end] for x in (taus, kds, ces, weights, teacher))
    y, counted = (x[:, int(shift) :] for x in (labels, mask & (labels != -100)))
    leaf = student.clone().requires_grad_()
    s = leaf[:, :end]
    log_q, log_p = ((x / taus[..., None]).log_softmax(-1) for x in (s, t))
    kd = taus**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    ce = F.cross_entropy(s.reshape(-1, VOCAB), y.reshape(-1), reduction="none").view(y.shape)
    rows = torch.where(counted, weights * (kds * kd + ces * ce), 0.0)
    expected = {"mean": rows.sum() / counted.sum().clamp(min=1), "sum": rows.sum(), "none": rows}[reduction]
    assert torch.allclose(ours[0].reshape(expected.shape), expected)
    assert torch.allclose(ours[1], torch.autograd.grad(expected.sum(), leaf)[0])
