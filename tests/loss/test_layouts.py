"""Rivals' layouts: their published bytes, and labels worked by hand."""

import math

import pytest
import torch

from kdfast.bench.layouts import LAYOUTS, Label, bytes_per_token, distillkit_label, sampledkd_label

P = torch.tensor([0.05, 0.5, 0.25, 0.125, 0.075], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "vocab_size", "entries", "nbytes"),
    [
        ("distillkit-recommended", 32_000, None, 296),
        ("distillkit-recommended", 128_256, None, 328),
        ("distillkit-recommended", 262_144, None, 344),
        ("distillkit-budget", 65_536, None, 114),  # the README's figure
        ("distillkit-budget", 128_256, None, 121),
        ("megatron", 128_256, 64, 320),
        ("maxtext", 128_256, 64, 512),
        ("maxtext", 128_256, 128, 1024),
        ("rskd", 128_256, 12, 36),
        ("rskd", 49_152, 12.5, 37.5),
        ("sampledkd", 151_936, None, 37),
        ("tinyvit", 21_841, 100, 404),
        ("fkd", 1000, 5, 57),
    ],
)
def test_bytes_as_published(name, vocab_size, entries, nbytes):
    assert bytes_per_token(name, vocab_size, entries) == nbytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zip", 10), "layout must be one of .* got 'zip'"),
        (("rskd", 10), "give their mean"),
        (("megatron", 10, 11), r"entries must lie in \(0, 10\], got 11"),
        (("megatron", 10, 0), "got 0"),
        (("distillkit-budget", 1000, 64), "has 50 entries, got 64"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bytes_per_token(*arguments)


def test_renormalised():
    renormalised = LAYOUTS["maxtext"].label(P, 2, None)
    assert renormalised.ids.tolist() == [1, 2]
    assert renormalised.weights.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert renormalised.rest == 0


def test_a_rest_that_is_not_spread_is_nowhere():
    label = Label(torch.tensor([1, 2]), torch.tensor([0.5, 0.25], dtype=torch.float64), rest=0.25)
    assert label.dense(5).tolist() == [0, 0.5, 0.25, 0, 0]


def test_a_ghost_token_holds_what_float16_log_probabilities_leave():
    label = LAYOUTS["megatron"].label(P, 3, None)
    expected = [math.exp(float(torch.tensor(math.log(p)).half())) for p in (0.5, 0.25, 0.125)]
    assert label.weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert label.weights.tolist() != [0.5, 0.25, 0.125]
    assert label.rest == pytest.approx(1 - sum(expected))
    assert not label.spread


@pytest.mark.parametrize("name", ["tinyvit", "fkd"])
def test_the_rest_is_spread_over_the_other_classes(name):
    label = LAYOUTS[name].label(P, 3, None)
    assert label.rest == pytest.approx(0.125)
    dense = label.dense(5)
    assert dense.tolist() == pytest.approx([0.0625, 0.5, 0.25, 0.125, 0.0625])


def test_every_class_listed_leaves_nothing_to_spread():
    assert Label(torch.arange(2), torch.tensor([0.5, 0.5], dtype=torch.float64), 0.0, True).dense(2).sum() == 1


def test_distillkit_fits_what_its_terms_can_and_no_more():
    # log-probabilities -1, then -2 - t / 2: a line in the rank, which (1, t, sqrt t) hold exactly.
    log_probs = torch.tensor([-1.0, *(-2 - t / 2 for t in range(6))], dtype=torch.float64)
    label = distillkit_label(log_probs.exp(), 7, 1, (0, 1, 0.5))
    torch.testing.assert_close(label.weights, log_probs.softmax(0), rtol=1e-5, atol=0)
    # A constant alone gives the six their geometric mean.
    label = distillkit_label(log_probs.exp(), 7, 1, (0,))
    flat = torch.tensor([-1.0, *[-3.25] * 6], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(label.weights, flat, rtol=1e-5, atol=0)
    # The first is rounded to bfloat16: 8 bits of significand.
    label = distillkit_label(torch.tensor([math.exp(-1.001), math.exp(-2.0)], dtype=torch.float64), 2, 1, (0,))
    assert float(label.weights[0] / label.weights[1]) == pytest.approx(math.exp(1.0), rel=1e-6)


@pytest.mark.parametrize("name", ["distillkit-recommended", "distillkit-budget"])
def test_distillkit_as_configured(name):
    layout = LAYOUTS[name]
    p = (torch.randn(2000, generator=generator(), dtype=torch.float64) * 2).softmax(0)
    label = layout.label(p, layout.entries, None)
    assert len(label.ids) == layout.entries
    assert float(label.weights.sum()) == pytest.approx(1)
    top = p.topk(layout.entries).values
    error = (label.weights.log() - (top / top.sum()).log()).abs().max()
    assert error < (0.1 if name == "distillkit-recommended" else 0.6)


def test_draws_are_counts_over_their_number_and_unbiased():
    label = LAYOUTS["rskd"].label(P, 8, generator())
    assert ((label.weights * 8) % 1 == 0).all()
    assert float(label.weights.sum()) == 1
    assert label.ids.unique().numel() == len(label.ids)
    source, rows = generator(1), 4000
    mean = sum(LAYOUTS["rskd"].label(P, 8, source).dense(5) for _ in range(rows)) / rows
    # Five standard errors of a mean of 4,000 rows of 8 draws.
    assert ((mean - P).abs() < 5 * (P * (1 - P) / (8 * rows)).sqrt()).all()


def test_the_cut_to_the_most_frequent_renormalises():
    p = torch.tensor([0.9, *[0.1 / 60] * 60], dtype=torch.float64)
    full = LAYOUTS["rskd"].label(p, 50, generator(3))
    label = sampledkd_label(p, 2, generator(3))
    assert len(full.ids) > 2
    assert len(label.ids) == 2
    counts = (full.weights * 50).sort(descending=True).values[:2]
    levels = [round(127 * float(c) / 50) for c in counts]
    assert label.weights.tolist() == pytest.approx([level / sum(levels) for level in levels])
    assert float(label.weights[0]) > float(full.weights.max())
