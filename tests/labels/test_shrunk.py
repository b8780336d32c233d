"""Draws that are moved a part of the way to their prototype: the mixture, its loss and its gradient."""

import pickle

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


def test_a_cache_is_opened_for_a_distance(tmp_path):
    options = {"vocab_size": VOCAB, "codec": "sample", "draws": 6}
    with kdfast.cache.Writer(tmp_path / "a", prototypes=make_prototypes(), **options) as writer:
        writer.add("a", make_logits(9))
    near, far = kdfast.cache.open(tmp_path / "a"), kdfast.cache.open(tmp_path / "a", shrink=0.6)
    want = near["a"].shrunk(0.6)
    for got in (far["a"], pickle.loads(pickle.dumps(far))["a"], pickle.loads(pickle.dumps(far.pack(["a"]))).unpack()):
        assert got.kind == "prototype"
        assert torch.equal(got.values, want.values)
        assert torch.equal(got.tails, want.tails)
    student = torch.randn(9, VOCAB)
    torch.testing.assert_close(kdfast.kd_loss(student, far.pack(["a"])), kdfast.kd_loss(student, want))
    with pytest.raises(ValueError, match=r"opened with shrink=\[0.0, 0.6\]"):
        kdfast.cache.PackedLabels.cat([near.pack(["a"]), far.pack(["a"])])
    with pytest.raises(ValueError, match=r"shrink must lie in \[0, 1\], got 1.2"):
        kdfast.cache.open(tmp_path / "a", shrink=1.2)
    with kdfast.cache.Writer(tmp_path / "b", **options) as writer:
        writer.add("a", make_logits(9))
    with pytest.raises(ValueError, match="this sample cache has none: capture with"):
        kdfast.cache.open(tmp_path / "b", shrink=0.6)


def test_another_share_is_another_run(tmp_path):
    with kdfast.cache.Writer(
        tmp_path / "a", vocab_size=VOCAB, codec="sample", draws=6, prototypes=make_prototypes()
    ) as writer:
        for key in range(4):
            writer.add(key, make_logits(1, seed=key))
    data = [{"input": torch.randn(2, 5), "key": torch.arange(2 * i, 2 * i + 2)} for i in range(2)]

    def fit(share):
        torch.manual_seed(0)
        student = torch.nn.Linear(5, VOCAB)
        cache = kdfast.cache.open(tmp_path / "a", shrink=share)
        return kdfast.Distiller(student, cache, folder=tmp_path / "run", temperature=1.0, ce_weight=0.0).fit(
            data, epochs=1
        )

    fit(0.5)
    with pytest.raises(ValueError, match="teacher"):
        fit(0.6)
    index = kdfast.cache.open(tmp_path / "a").index([0, 3])  # of the same shards
    assert len(kdfast.cache.open(tmp_path / "a", shrink=0.5).gather(index)) == 2
