"""What the tests of every sampler share: the law itself, and rows to try it on.

The model is the law in float64 and by definition: where the points fall along the cumulative probability. The ops' sums
round differently, so a point within EPS of a column's edge may fall on its neighbour.
"""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from kdfast.cache.selection import select

EPS = 3e-6
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def probabilities(logits, temperature=1.0):
    return (logits.double() / temperature).softmax(-1).numpy()


def edges(masses, eps):
    """Where columns begin and end along the cumulative sum, each pulled outwards by eps."""
    end = masses.cumsum()
    return np.concatenate([[0.0], end[:-1]]) - eps, end + eps


def on_grid(p, tau, offset, eps=0.0):
    """Which columns above 0 hold a point (k + offset) * tau."""
    begin, end = edges(p, eps)
    points = [np.ceil(edge / tau - offset).clip(0) for edge in (begin, end)]
    return (points[1] > points[0]) & (p > 0)


def points_on(p, positions, eps=0.0):
    """How many of the sorted positions fall on each column."""
    begin, end = edges(p, eps)
    return (np.searchsorted(positions, end) - np.searchsorted(positions, begin)).clip(0) * (p > 0)


def positions(seed, row, draws, systematic=False):
    if systematic:
        return (np.arange(draws) + select.uniforms(seed, row, 1)[0]) / draws
    sums = -np.log(select.uniforms(seed, row, 1, draws + 1)[0])
    return sums.cumsum()[:-1] / sums.sum()


def rows_of(out):
    """Each row's ids and values."""
    sizes = out.counts.tolist()
    return [(i.numpy(), v.numpy()) for i, v in zip(out.ids.split(sizes), out[1].split(sizes), strict=True)]


def assert_threshold_row(p, ids, probs, tau, offset, eps=EPS):
    kept = np.isin(np.arange(len(p)), ids)
    assert (np.diff(ids) > 0).all()
    assert (p[ids] > 0).all()
    assert len(ids) <= math.ceil(1 / tau) + 1
    near = np.abs(p - tau) <= eps * tau
    above = (p > tau) & ~near
    assert kept[above].all()
    np.testing.assert_allclose(probs, np.where(p > tau, p, tau)[ids], rtol=EPS)
    walk = np.where(p > tau, 0.0, p)
    sure, possible = (on_grid(walk, tau, offset, slack) for slack in (-eps, eps))
    assert kept[sure].all()
    assert (possible | (p >= tau) | near)[kept].all()


def assert_sampled_row(p, ids, draws, where, eps=EPS):
    assert (np.diff(ids) > 0).all()
    assert (p[ids] > 0).all()
    assert (draws > 0).all()
    assert draws.sum() == len(where)
    count = np.zeros(len(p), int)
    count[ids] = draws
    assert (count >= points_on(p, where, -eps)).all()
    assert (count <= points_on(p, where, eps)).all()


def likeliest(logits, temperature, k):
    """By a stable sort in float64: of equal columns the one with the smaller id comes first."""
    p = (logits.double() / temperature).softmax(1)
    ids = logits.double().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return ids, p.gather(1, ids), p.scatter(1, ids, 0.0).sum(1)


def assert_top(out, logits, temperature, k):
    ids, probs, rest = likeliest(logits, temperature, k)
    there = logits.double().gather(1, ids) > -torch.inf  # however small its probability, a column is one
    assert torch.equal(out.ids[there], ids[there].int())
    assert not out.ids[~there].any()
    assert not out.probs[~there].any()
    # Float32 exponentials do not tell less from 0.
    torch.testing.assert_close(out.probs[there], probs[there], rtol=3e-5, atol=1e-37)
    torch.testing.assert_close(out.rest, rest, rtol=3e-5, atol=1e-37)
    torch.testing.assert_close(out.lse.double(), (logits.double() / temperature).logsumexp(1), rtol=1e-5, atol=1e-5)


@st.composite
def cases(draw):
    """Logits of any dtype and width, with masks, ties and offsets."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, vocab = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 16, 31, 127, 128, 129, 400, 1025]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.0, 1, 4, 30]))
    logits += draw(st.sampled_from([0.0, 0.0, 5000, 1e9])) if dtype != torch.float16 else 0.0
    if draw(st.booleans()):  # a climb, in which every chunk lies far above the one before
        logits += torch.arange(vocab) // 100 * 60.0
    masked = torch.rand(rows, vocab, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.5, 0.97]))
    masked[:, : draw(st.sampled_from([0, 0, vocab // 2]))] = True
    masked[:, draw(st.integers(0, vocab - 1))] = False
    temperature = draw(st.sampled_from([1.0, 1.0, 0.3, 2.0, 20.0]))
    return logits.masked_fill(masked, -math.inf).to(dtype), temperature
