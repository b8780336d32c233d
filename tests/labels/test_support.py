"""The table of what stored labels serve, against what kd_loss does with them."""

import math

import pytest
import torch

from kdfast import Divergence, OutputLayer, SoftLabels, kd_loss
from kdfast.cache import codecs
from kdfast.cache.selection.prototypes import PrototypeTable
from kdfast.divergences import DIVERGENCES
from kdfast.labels.support import SERVES, supporting_kinds

VOCAB, ROWS = 7, 3
STUDENT = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1))
TEACHER = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(2))
TARGET = torch.tensor([1, 0, 6])
P = TEACHER.softmax(1)
HALF = torch.full((ROWS,), math.log(0.5))
ALL = set(DIVERGENCES)
LABELS = {
    "topk": SoftLabels.topk(*(x.flip(1) for x in P.log().topk(2)[::-1]), HALF, vocab_size=VOCAB),
    "weights": SoftLabels.weights(torch.arange(VOCAB).expand_as(P), P, vocab_size=VOCAB),
    "prototype": SoftLabels.prototype(
        torch.zeros(ROWS, 1).long(), P[:, :1], HALF, torch.zeros(ROWS).long(), P[:1].contiguous(), vocab_size=VOCAB
    ),
    "dense": SoftLabels.dense(TEACHER),
    "hidden": SoftLabels.hidden(TEACHER, OutputLayer(torch.eye(VOCAB))),
}
# Stated once more, by hand.
SERVED = {
    "topk": {"forward_kl", "soft_ce"},
    "weights": {"soft_ce"},
    "prototype": ALL - {"logit_mse"},
    "dense": ALL,
    "hidden": ALL,
}


OWN_CODECS = ["dense", "hard", "hidden", "prototype", "sample", "scored", "threshold", "topk"]


def test_the_table_has_a_row_for_every_kind():
    assert set(SERVES) == set(LABELS) == {label.kind for label in LABELS.values()}
    assert {kind: set(support.divergences) for kind, support in SERVES.items()} == SERVED
    assert {codecs.find(name).kind for name in OWN_CODECS} == set(SERVES)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", LABELS)
def test_kd_loss_serves_exactly_what_the_table_says(kind, name):
    if name in SERVED[kind]:
        assert kd_loss(STUDENT, LABELS[kind], TARGET, divergence=name).isfinite()
    else:
        with pytest.raises(ValueError, match=f"{kind} soft labels serve .*got divergence {name}.*dense and hidden"):
            kd_loss(STUDENT, LABELS[kind], TARGET, divergence=name)


@pytest.mark.parametrize("kind", LABELS)
def test_standardized_logits_need_whole_rows(kind):
    divergence = Divergence("forward_kl", standardize=True)
    if kind in ("dense", "hidden"):
        assert kd_loss(STUDENT, LABELS[kind], divergence=divergence).isfinite()
    else:
        with pytest.raises(
            ValueError, match=r"got divergence forward_kl, standardized.*; dense and hidden labels serve it"
        ):
            kd_loss(STUDENT, LABELS[kind], divergence=divergence)


@pytest.mark.parametrize("temperature", [2.0, torch.full((ROWS,), 1.0)])
@pytest.mark.parametrize("kind", LABELS)
def test_other_temperatures_need_whole_rows(kind, temperature):
    if kind in ("dense", "hidden"):
        assert kd_loss(STUDENT, LABELS[kind], divergence="soft_ce", temperature=temperature).isfinite()
    else:
        with pytest.raises(
            ValueError, match=r"hold teacher_temperature \(1.0,\), got .*; dense and hidden labels serve any"
        ):
            kd_loss(STUDENT, LABELS[kind], divergence="soft_ce", temperature=temperature)


def test_supporting_kinds_lists_the_kinds():
    assert supporting_kinds(Divergence("soft_ce")) == list(SERVES)
    assert supporting_kinds(Divergence("reverse_kl")) == ["prototype", "dense", "hidden"]
    assert supporting_kinds(Divergence("soft_ce"), any_temperature=True) == ["dense", "hidden"]


def options_of(name):
    table = PrototypeTable.of(P, P)
    return {"hidden": {"width": VOCAB, "head": "0" * 32}, "prototype": {"prototypes": table}}.get(name, {})


@pytest.mark.parametrize("name", OWN_CODECS)
def test_a_codec_gives_labels_of_its_kind(name):
    codec = codecs.create(name, VOCAB, (1.0,), options_of(name))
    assert codec.select(TEACHER, b"\0" * 16).kind == codecs.find(name).kind
