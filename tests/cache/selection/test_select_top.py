"""The likeliest columns: exactly those of a stable sort, and what they leave to the last digit."""

import math

import pytest
import torch

from kdfast.cache.selection import select
from support.select_checks import DTYPES, assert_top


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 1000, 5003])
def test_the_likeliest_columns_and_the_rest(dtype, vocab):
    torch.manual_seed(vocab)
    logits = torch.randn(6, vocab) * 3
    logits[0] = logits[0].masked_fill(torch.rand(vocab) < 0.5, -math.inf)
    logits[0, 0] = logits[1] = 0.0  # uniform
    logits[2] = (logits[2] * 2).round() / 2  # ties
    logits[3] = torch.linspace(-30, 30, vocab)  # each chunk has better columns than the one before
    logits[4] = logits[3].flip(0)
    logits = logits.to(dtype)
    for k in {0, 1, 3, 64, vocab}:
        if k <= vocab:
            assert_top(select.top(logits, temperature=1.3, k=k), logits, 1.3, k)


def test_a_rest_far_below_1_keeps_its_digits():
    logits = torch.full((1, 1000), -30.0)
    logits[0, 500] = 0.0
    out = select.top(logits, temperature=1.0, k=1)
    torch.testing.assert_close(out.rest[0].item(), 999 * math.exp(-30) / (1 + 999 * math.exp(-30)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [60, 400, 1000])
@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_columns_behind_a_lead_that_exponentials_do_not_reach(dtype, vocab, at):
    torch.manual_seed(vocab)
    logits = torch.randn(4, vocab) * 20 - 200
    logits[0, : vocab // 2] = -math.inf
    logits[1, vocab // 3 :] = -math.inf
    logits[:, int(at * (vocab - 1))] = 0.0
    logits[2] *= 10  # beyond float64's range, too
    logits = logits.to(dtype)
    for temperature in (1.0, 50.0):
        for k in (1, 5, vocab):
            assert_top(select.top(logits, temperature=temperature, k=k), logits, temperature, k)
    fallback = select.Top(*select._top(logits[None], 1.0, 5))
    here = fallback.ids == select.top(logits, temperature=1.0, k=5).ids
    same = logits.gather(1, fallback.ids.long()) == logits.gather(
        1, select.top(logits, temperature=1.0, k=5).ids.long()
    )
    assert (here | same).all()  # equal columns have no order there


def test_missing_columns_are_masked_ones():
    logits = torch.full((3, 300), -math.inf)
    logits[0, [7, 200]] = torch.tensor([0.0, -2000.0])
    logits[1, 5] = 1.0
    logits[2] = -3000.0
    logits[2, 9] = 0.0
    likeliest = select.top(logits, temperature=1.0, k=3)
    assert select.missing(logits, likeliest).tolist() == [[False, False, True], [False, True, True], [False] * 3]
    assert likeliest.ids.tolist() == [[7, 200, 0], [5, 0, 0], [9, 0, 1]]


def test_a_row_with_fewer_columns_than_asked_for():
    logits = torch.full((1, 300), -math.inf)
    logits[0, [7, 200]] = torch.tensor([0.0, math.log(3.0)])
    out = select.top(logits, temperature=1.0, k=4)
    assert out.ids.tolist() == [[200, 7, 0, 0]]
    torch.testing.assert_close(out.probs, torch.tensor([[0.75, 0.25, 0, 0]], dtype=torch.float64), rtol=1e-6, atol=0)
    assert out.rest.tolist() == [0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_says_so_and_harms_no_other(bad):
    logits = torch.randn(3, 1000)
    whole = select.top(logits, temperature=1.0, k=3)
    logits[1] = bad
    out = select.top(logits, temperature=1.0, k=3)
    assert out.lse.isnan().tolist() == [False, True, False]
    assert not out.probs[1].any()
    for row in (0, 2):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(out, whole, strict=True))


def test_rows_do_not_depend_on_batch_threads_or_strides():
    logits = torch.randn(301, 700) * 2
    whole = select.top(logits, temperature=1.5, k=5)

    def same(out):
        return all(torch.equal(a, b) for a, b in zip(out, whole, strict=True))

    parts = [select.top(part, temperature=1.5, k=5) for part in logits.split(100)]
    assert same([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
    assert same(select.top(logits.t().contiguous().t(), temperature=1.5, k=5))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert same(select.top(logits, temperature=1.5, k=5))
    finally:
        torch.set_num_threads(threads)
    assert [tuple(x.shape) for x in select.top(logits[:0], temperature=1.0, k=5)] == [(0, 5), (0, 5), (0,), (0,)]


def test_the_fallback_agrees():
    logits = torch.randn(20, 300) * 3
    logits[0, 4:] = -math.inf
    assert_top(select.Top(*select._top(logits[None], 0.7, 5)), logits, 0.7, 5)


def test_the_op_traces():
    op = torch.ops.kdfast.select_top.default
    torch.library.opcheck(op, (torch.randn(1, 3, 50), 1.0, 4), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("k", [-1, 9])
def test_bad_arguments_are_named(k):
    with pytest.raises(ValueError, match=rf"k must lie in \[0, 8\], got {k}"):
        select.top(torch.zeros(2, 8), temperature=1.0, k=k)
    with pytest.raises(ValueError, match="temperature must be positive"):
        select.top(torch.zeros(2, 8), temperature=0.0, k=1)
    with pytest.raises(TypeError, match="logits must"):
        select.top(torch.zeros(2, 8).int(), temperature=1.0, k=1)
