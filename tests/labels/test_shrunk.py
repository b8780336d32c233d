"""Draws that are moved a part of the way to their prototype: the mixture, its loss and its gradient."""

import pytest
import torch

import kdfast
from kdfast.cache import codecs
from support.entry_checks import VOCAB, learned, make_logits, make_prototypes, through_bytes

SHARES = [0.2, 0.75, 1.0]


def drawn(rows=12, draws=6):
    codec = codecs.create("sample", VOCAB, (1.0,), {"draws": draws, "prototypes": make_prototypes()})
    labels = codec.select(make_logits(rows), b"key")
    learned(codec, labels)
    return through_bytes(codec, labels)


def dense_weights(labels):
    """(rows, vocab) float64."""
    dense = torch.zeros(len(labels), VOCAB, dtype=torch.float64)
    dense[labels.entry_rows, labels.ids.long()] = labels.values.double()
    return dense


def mixture(labels, share):
    typical = labels.prototypes[labels.prototype_ids].double()
    mixed = (1 - share) * dense_weights(labels) + share * typical
    return mixed / mixed.sum(1, keepdim=True)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce", "jsd"])
def test_the_loss_is_that_of_the_mixture(share, divergence):
    labels = drawn()
    student = torch.randn(len(labels), VOCAB, dtype=torch.float64, requires_grad=True)
    want = kdfast.kd_loss(student, mixture(labels, share).log(), divergence=divergence)
    got = kdfast.kd_loss(student, labels.shrunk(share), divergence=divergence)
    # A prototype is bfloat16, and adds up to 1 within its rounding.
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-4)
    (g,), (w,) = torch.autograd.grad(got, student), torch.autograd.grad(want, student)
    torch.testing.assert_close(g, w, rtol=1e-2, atol=2e-5)


def test_without_a_share_the_labels_stay():
    labels = drawn()
    assert labels.shrunk(0.0) is labels


def test_rows_are_taken_and_joined_with_their_prototypes():
    labels = drawn()
    parts = [labels[[3, 1]], labels[5:7]]
    joined = kdfast.SoftLabels.cat(parts)
    torch.testing.assert_close(mixture(joined, 0.4), mixture(labels, 0.4)[[3, 1, 5, 6]])
    other = codecs.create("sample", VOCAB, (1.0,), {"draws": 6}).select(make_logits(2), b"")
    assert kdfast.SoftLabels.cat([labels, other]).prototypes is None


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_its_range_is_named(share):
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got"):
        drawn().shrunk(share)


def test_labels_without_prototypes_are_named():
    labels = codecs.create("sample", VOCAB, (1.0,), {"draws": 6}).select(make_logits(2), b"")
    with pytest.raises(ValueError, match="labels without prototypes cannot be shrunk"):
        labels.shrunk(0.5)


def test_the_mean_moves_and_the_noise_shrinks():
    """Over redraws: the expectation is the mixture, the variance that of the draws times (1 - share) squared."""
    logits = make_logits(1, scale=1.5).expand(4000, -1)
    codec = codecs.create("sample", VOCAB, (1.0,), {"draws": 4, "prototypes": make_prototypes(count=1)})
    labels = codec.select(logits, b"")
    learned(codec, labels)
    labels = through_bytes(codec, labels)
    weights, mixed = dense_weights(labels), mixture(labels, 0.5)
    probs, typical = logits[0].double().softmax(0), labels.prototypes[0].double()
    error = (mixed.mean(0) - (probs + typical / typical.sum()) / 2) / (mixed.std(0) / 4000**0.5 + 1e-4)
    assert error.abs().max() < 4
    torch.testing.assert_close(mixed.var(0), weights.var(0) / 4, rtol=0.01, atol=1e-6)
