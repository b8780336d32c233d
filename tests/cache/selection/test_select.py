"""The unbiased samplers: their law, their bounds, and what their randomness depends on."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.cache.selection import select
from support.select_checks import (
    DTYPES,
    assert_sampled_row,
    assert_threshold_row,
    cases,
    on_grid,
    positions,
    probabilities,
    rows_of,
)

# ---- the law --------------------------------------------------------------------------------------------------------


def test_the_models_expectation_is_the_softmax():
    """Over the offset, what is kept is piecewise constant: its breakpoints are known, so the integral is exact."""
    for seed, tau in enumerate([0.3, 0.11, 0.05, 1.0]):
        p = np.random.default_rng(seed).dirichlet(np.full(9, 0.5))
        low = np.where(p > tau, 0.0, p)
        breaks = np.unique(np.concatenate([[0.0, 1.0], (low.cumsum() / tau) % 1]))
        kept = sum((b - a) * on_grid(low, tau, (a + b) / 2) for a, b in itertools.pairwise(breaks))
        np.testing.assert_allclose(kept * tau, low, atol=1e-12)


@settings(deadline=None, max_examples=150)
@given(case=cases(), tau=st.sampled_from([1.0, 0.7, 0.25, 0.05, 0.02, 1e-4]), seed=st.integers(-(2**63), 2**63 - 1))
def test_threshold_keeps_what_the_model_keeps(case, tau, seed):
    logits, temperature = case
    out = select.threshold(logits, temperature=temperature, tau=tau, seed=seed, first_row=3)
    torch.testing.assert_close(out.lse, (logits.double() / temperature).logsumexp(1).float(), rtol=1e-6, atol=1e-5)
    for row, (ids, probs) in enumerate(rows_of(out)):
        assert len(ids)
        offset = select.uniforms(seed, 3 + row, 1)[0, 0]
        assert_threshold_row(probabilities(logits[row], temperature), ids, probs, tau, offset)


@settings(deadline=None, max_examples=150)
@given(
    case=cases(),
    draws=st.sampled_from([1, 2, 23, 50, 1000]),
    systematic=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_sample_draws_what_the_model_draws(case, draws, systematic, seed):
    logits, temperature = case
    out = select.sample(logits, temperature=temperature, draws=draws, systematic=systematic, seed=seed, first_row=3)
    torch.testing.assert_close(out.lse, (logits.double() / temperature).logsumexp(1).float(), rtol=1e-6, atol=1e-5)
    for row, (ids, counts) in enumerate(rows_of(out)):
        where = positions(seed, 3 + row, draws, systematic)
        assert_sampled_row(probabilities(logits[row], temperature), ids, counts, where)


def test_large_vocabularies():
    logits = torch.randn(6, 49155) * torch.tensor([[0.0], [1], [2], [3], [3], [5]])
    logits[3, :40000] = -math.inf
    p = probabilities(logits)
    for row, (ids, probs) in enumerate(rows_of(select.threshold(logits, temperature=1.0, tau=0.02, seed=3))):
        assert_threshold_row(p[row], ids, probs, 0.02, select.uniforms(3, row, 1)[0, 0])
    for row, (ids, counts) in enumerate(rows_of(select.sample(logits, temperature=1.0, draws=50, seed=3))):
        assert_sampled_row(p[row], ids, counts, positions(3, row, 50))


def assert_mean(weights, p, expected_counts):
    """Means over redraws have expectation p: z-scores, rare columns pooled, at 1e-6 for the whole family."""
    rare = expected_counts < 25
    columns = np.concatenate([weights[:, ~rare], weights[:, rare].sum(1, keepdims=True)], 1)
    want = np.append(p[~rare], p[rare].sum())
    error = columns.std(0) / math.sqrt(len(columns))
    fixed = error < 1e-9
    np.testing.assert_allclose(columns.mean(0)[fixed], want[fixed], rtol=1e-5, atol=1e-12)
    z = np.abs(columns.mean(0) - want)[~fixed] / error[~fixed]
    assert z.max() < statistics.NormalDist().inv_cdf(1 - 1e-6 / len(z))


def dense(out, rows, vocab):
    weights = torch.zeros(rows, vocab, dtype=torch.float64)
    weights[torch.repeat_interleave(torch.arange(rows), out.counts.long()), out.ids.long()] = out[1].double()
    return weights.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_are_unbiased(dtype):
    redraws, logits = 20000, (torch.randn(200) * 2).to(dtype)
    p, rows = probabilities(logits), logits.expand(20000, -1)
    weights = dense(select.threshold(rows, temperature=1.0, tau=0.03, seed=11), redraws, 200)
    assert_mean(weights, p, redraws * np.minimum(p / 0.03, 1))
    assert (np.abs(weights.sum(1) - 1) < 0.03 + 1e-5).all()
    weights = dense(select.sample(rows, temperature=1.0, draws=10, seed=11), redraws, 200) / 10
    assert_mean(weights, p, redraws * 10 * p)
    # Independent draws: a column's count has the binomial variance.
    top = p.argmax()
    assert weights[:, top].var() == pytest.approx(p[top] * (1 - p[top]) / 10, rel=0.05)
    weights = dense(select.sample(rows, temperature=1.0, draws=10, systematic=True, seed=11), redraws, 200) / 10
    assert_mean(weights, p, redraws * 10 * p)
    # Systematic ones: it is 10 p rounded up or down.
    assert set(np.unique(weights[:, top] * 10).round(4)) <= {np.floor(10 * p[top]), np.ceil(10 * p[top])}
    part = 10 * p[top] % 1
    assert weights[:, top].var() == pytest.approx(part * (1 - part) / 100, rel=0.05)


# ---- edges ----------------------------------------------------------------------------------------------------------


def test_a_probability_of_tau_is_always_kept():
    out = select.threshold(torch.zeros(100, 4), temperature=1.0, tau=0.25, seed=0)
    assert out.ids.tolist() == [0, 1, 2, 3] * 100
    assert (out.probs == 0.25).all()


def test_uniform_rows_keep_one_column_of_each_stretch():
    out = select.threshold(torch.full((100, 1000), 1e9), temperature=1.0, tau=0.05, seed=0)
    assert (out.counts == 20).all()
    assert (out.ids.view(100, 20) // 50 == torch.arange(20)).all()
    assert len(out.ids[:20].unique()) == 20
    assert len(out.ids.unique()) > 700


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "alone"), [(1, 0), (2, 1), (1000, 0), (1000, 640), (1000, 999)])
def test_one_column_takes_everything(dtype, vocab, alone):
    logits = torch.full((50, vocab), -math.inf, dtype=dtype)
    logits[:, alone] = -300.0
    for tau in (1.0, 0.5, 1e-4):
        out = select.threshold(logits, temperature=0.7, tau=tau, seed=2)
        assert (out.ids == alone).all()
        assert (out.counts == 1).all()
        assert (out.probs == 1).all()
    drawn = select.sample(logits, temperature=0.7, draws=1000, seed=2)
    assert (drawn.ids == alone).all()
    assert (drawn.draws == 1000).all()
    assert len(drawn.ids) == 50


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_temperatures_are_argmax_and_uniform(temperature):
    out = select.sample(torch.arange(200.0).expand(5, -1), temperature=temperature, draws=100, seed=2)
    assert (out.counts == 1).all() if temperature < 1 else (out.counts > 50).all()
    assert (out.ids == 199).all() or temperature > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 700, 999, slice(128, 256), slice(None)])
def test_a_bad_row_has_no_entries_and_harms_no_other(bad, at):
    logits = torch.randn(3, 1000)
    whole = rows_of(select.threshold(logits, temperature=1.0, tau=0.05, seed=2))
    logits[1, at] = bad
    out = select.threshold(logits, temperature=1.0, tau=0.05, seed=2)
    assert out.counts[1] == 0
    assert out.lse.isnan().tolist() == [False, True, False]
    for row in (0, 2):
        assert (rows_of(out)[row][0] == whole[row][0]).all()
    assert select.sample(logits, temperature=1.0, draws=5, seed=2).counts[1] == 0


def test_a_row_without_a_finite_column_has_no_entries():
    assert select.threshold(torch.full((2, 300), -math.inf), temperature=1.0, tau=1.0, seed=0).counts.tolist() == [0, 0]


def test_a_grid_finer_than_rounding_keeps_every_column():
    logits = torch.randn(20, 1000, dtype=torch.float64) * 12
    p = probabilities(logits)
    for tau in (1e-17, 1e-30, 1e-300):
        weights = dense(select.threshold(logits, temperature=1.0, tau=tau, seed=0), 20, 1000)
        np.testing.assert_allclose(weights, p, rtol=1e-6, atol=2 * tau)


def test_the_lowest_finite_logits_are_like_any_other():
    logits = torch.full((20, 300), torch.finfo(torch.float32).min)
    logits[:, :128] = -math.inf
    out = select.sample(logits, temperature=1.0, draws=300, seed=2)
    assert int(out.ids.min()) >= 128
    assert (out.counts > 80).all()


def test_no_rows():
    empty = torch.empty(0, 7)
    out = select.threshold(empty, temperature=1.0, tau=0.05, seed=0)
    assert [len(x) for x in out] == [0, 0, 0, 0]
    assert [len(x) for x in select.sample(empty, temperature=1.0, draws=3, seed=0)] == [0, 0, 0, 0]


# ---- what the entries depend on -------------------------------------------------------------------------------------

RUNS = {
    "threshold": lambda x, **more: select.threshold(x, temperature=1.5, tau=0.03, seed=9, **more),
    "sample": lambda x, **more: select.sample(x, temperature=1.5, draws=40, seed=9, **more),
    "systematic": lambda x, **more: select.sample(x, temperature=1.5, draws=40, systematic=True, seed=9, **more),
}


@pytest.mark.parametrize("name", RUNS)
def test_rows_do_not_depend_on_batch_threads_or_strides(name):
    run = RUNS[name]
    logits = torch.randn(301, 700) * 2
    whole = run(logits)

    def same(out):
        return all(torch.equal(a, b) for a, b in zip(out, whole, strict=True))

    parts = [run(part, first_row=start) for start, part in ((0, logits[:1]), (1, logits[1:200]), (200, logits[200:]))]
    assert same([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
    wide = torch.full((602, 900), math.nan)
    wide[::2, 150:850] = logits
    assert same(run(wide[::2, 150:850]))
    assert same(run(logits.t().contiguous().t()))
    assert same(run(logits.clone().requires_grad_()))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert same(run(logits))
    finally:
        torch.set_num_threads(threads)


def test_the_seed_and_the_row_matter():
    rows = torch.zeros(2, 500)
    first, second = rows_of(select.sample(rows, temperature=1.0, draws=5, seed=1))
    other, _ = rows_of(select.sample(rows, temperature=1.0, draws=5, seed=2))
    assert first[0].tolist() != second[0].tolist() != other[0].tolist() != first[0].tolist()


def test_uniforms_are_what_caches_were_written_with():
    """splitmix64: caches are only reproduced while these stay."""
    assert select.uniforms(0, 0, 2, 2).tolist() == [
        [0.13870941014555427, 0.9711020828012883],
        [0.18383979100743952, 0.6250937004946516],
    ]
    assert (select.uniforms(5, 7, 3, 4) == select.uniforms(5, 6, 4, 4)[1:]).all()
    assert select.record_seed(-1, b"key") == 7284093013499096731
    many = select.uniforms(-3, 0, 300, 300).ravel()
    assert many.min() > 0
    assert many.max() < 1
    assert np.histogram(many, 10, (0, 1))[0] == pytest.approx(len(many) / 10, rel=0.03)


# ---- other devices --------------------------------------------------------------------------------------------------


def test_the_fallback_has_the_same_law():
    logits = (torch.randn(60, 500) * 3).masked_fill(torch.rand(60, 500) < 0.2, -math.inf)
    logits[:, 450:] = -math.inf
    logits[:, 0] = 3.0
    p = probabilities(logits, 1.5)
    out = select.Thresholded(*select._threshold(logits[None], 1.5, 0.03, 8, 2))
    for row, (ids, probs) in enumerate(rows_of(out)):
        assert_threshold_row(p[row], ids, probs, 0.03, select.uniforms(8, 2 + row, 1)[0, 0], eps=1e-12)
    for systematic in (False, True):
        drawn = select.Drawn(*select._sample(logits[None], 1.5, 60, systematic, 8, 2))
        for row, (ids, counts) in enumerate(rows_of(drawn)):
            assert_sampled_row(p[row], ids, counts, positions(8, 2 + row, 60, systematic), eps=1e-12)
    torch.testing.assert_close(out.lse, (logits / 1.5).logsumexp(1))


@pytest.mark.parametrize(
    ("name", "amount"), [("select_threshold", (0.05,)), ("select_sample", (20, False)), ("select_sample", (20, True))]
)
def test_ops_trace_with_unknown_sizes(name, amount):
    op = getattr(torch.ops.kdfast, name).default
    torch.library.opcheck(
        op, (torch.randn(1, 3, 50), 1.0, *amount, 1, 0), test_utils=("test_schema", "test_faketensor")
    )


# ---- bad arguments --------------------------------------------------------------------------------------------------

GOOD = {
    select.threshold: {"temperature": 1.0, "tau": 0.05, "seed": 0},
    select.sample: {"temperature": 1.0, "draws": 5, "seed": 0},
}


@pytest.mark.parametrize(
    ("call", "bad", "match"),
    [
        (select.threshold, {"tau": 0.0}, r"tau must lie in \(0, 1\], got 0.0"),
        (select.threshold, {"tau": 1.5}, r"tau must lie in \(0, 1\], got 1.5"),
        (select.threshold, {"tau": math.nan}, r"tau must lie in \(0, 1\], got nan"),
        (select.threshold, {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (select.sample, {"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        (select.sample, {"draws": 0}, r"draws must lie in \[1, 2\*\*31\), got 0"),
        (select.sample, {"draws": 2**31}, r"draws must lie in \[1, 2\*\*31\), got 2147483648"),
        (select.sample, {"seed": 2**63}, "seed must be a signed 64-bit integer, got 9223372036854775808"),
        (select.threshold, {"first_row": -1}, "first_row must lie in"),
    ],
)
def test_bad_arguments_are_named(call, bad, match):
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(2, 8), **{**GOOD[call], **bad})


@pytest.mark.parametrize(
    ("logits", "error"),
    [
        (torch.zeros(8), ValueError),
        (torch.zeros(2, 0), ValueError),
        (torch.zeros(2, 8).int(), TypeError),
        (3, TypeError),
    ],
)
def test_bad_logits_are_named(logits, error):
    for call, arguments in GOOD.items():
        with pytest.raises(error, match="logits must"):
            call(logits, **arguments)
