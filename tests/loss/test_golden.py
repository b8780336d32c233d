"""Worked numbers, in natural logarithms, through every path."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from kdfast import SoftLabels, kd_loss

T = torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64)
S = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
Y = torch.tensor([0])
T2 = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64)
S2 = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)


def _all_entries(p):
    ids = torch.arange(p.shape[1]).expand_as(p)
    return SoftLabels.topk(ids, p.log(), torch.full((p.shape[0],), -math.inf), vocab_size=p.shape[1])


def _weights(p):
    return SoftLabels.weights(torch.arange(p.shape[1]).expand_as(p), p, vocab_size=p.shape[1])


PATHS = {"dense": torch.log, "soft labels": lambda p: SoftLabels.dense(p.log()), "top-k": _all_entries}
MODES = ["fused", "recompute", "inplace", "no grad"]


def loss(student, teacher, labels=None, *, mode, **options):
    if mode == "no grad":
        return kd_loss(student, teacher, labels, **options).item()
    leaf = student.clone().requires_grad_()
    return kd_loss(leaf * 1.0, teacher, labels, backward=mode, **options).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", MODES)
def test_three_classes(dtype, path, mode):
    student, teacher = S.log().to(dtype), PATHS[path](T)
    close = {"abs": 5e-6}
    assert loss(student, teacher, mode=mode) == pytest.approx(0.12401, **close)
    assert loss(student, teacher, mode=mode, divergence="soft_ce") == pytest.approx(1.21291, **close)
    assert loss(student, teacher, Y, mode=mode, kd_weight=0.0, ce_weight=1.0) == pytest.approx(1.60944, **close)
    assert loss(student, teacher, Y, mode=mode, kd_weight=0.3, ce_weight=0.7) == pytest.approx(1.16381, **close)
    if path != "top-k":
        assert loss(student, teacher, mode=mode, divergence="reverse_kl") == pytest.approx(0.11678, **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", MODES)
def test_two_rows(dtype, path, mode):
    student, teacher = S2.log().to(dtype), PATHS[path](T2)
    close = {"abs": 1e-5}
    assert loss(student, teacher, mode=mode, reduction="sum") == pytest.approx(0.08881, **close)
    assert loss(student, teacher, mode=mode) == pytest.approx(0.04440, **close)
    assert loss(student, teacher, mode=mode, divergence="soft_ce", reduction="sum") == pytest.approx(1.08961, **close)
    assert loss(student, teacher, mode=mode, divergence="soft_ce") == pytest.approx(0.54481, **close)
    # Half cross-entropy with the teacher's distribution, half KL.
    both = {"mode": mode, "kd_weight": 0.5, "ce_weight": 0.5}
    assert loss(student, teacher, T2.to(dtype), **both, reduction="sum") == pytest.approx(0.58921, **close)
    assert loss(student, teacher, T2.to(dtype), **both) == pytest.approx(0.29460, **close)


def test_unnormalised_weights_give_soft_cross_entropy():
    assert kd_loss(S.log(), _weights(T), divergence="soft_ce").item() == pytest.approx(1.21291, abs=5e-6)
    # Twice the weight, twice the loss: nothing is renormalised.
    assert kd_loss(S.log(), _weights(2 * T), divergence="soft_ce").item() == pytest.approx(2.42582, abs=5e-6)


def test_cross_entropy_is_torchs():
    logits, labels = torch.randn(7, 40), torch.randint(0, 40, (7,))
    labels[2] = -100
    for smoothing in (0.0, 0.1):
        ours = kd_loss(logits, logits, labels, kd_weight=0.0, ce_weight=1.0, label_smoothing=smoothing)
        assert torch.allclose(ours, cross_entropy(logits, labels, label_smoothing=smoothing), rtol=1e-6)
    probs = torch.rand(7, 40).softmax(1)
    ours = kd_loss(logits, logits, probs, kd_weight=0.0, ce_weight=1.0, label_smoothing=0.1)
    assert torch.allclose(ours, cross_entropy(logits, probs, label_smoothing=0.1), rtol=1e-6)
