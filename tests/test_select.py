"""The unbiased samplers: their law, their bounds, and what their randomness depends on."""

import pytest
import torch

from kdfast.cache import select


def rows_of(out):
    """Each row's ids and values."""
    sizes = out.counts.tolist()
    return list(zip(out.ids.split(sizes), out[1].split(sizes), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_entries_are_the_fallbacks(dtype):
    logits = (torch.randn(200, 300) * 3).to(dtype)
    out = select.threshold(logits, temperature=1.5, tau=0.05, seed=7, first_row=3)
    plain = select._threshold(logits[None], 1.5, 0.05, 7, 3)
    assert torch.equal(out.ids, plain[0])
    torch.testing.assert_close(out.probs, plain[1], rtol=1e-5, atol=0)
    assert torch.equal(out.counts, plain[2])
    torch.testing.assert_close(out.lse, plain[3])
    drawn = select.sample(logits, temperature=1.5, draws=50, seed=7, first_row=3)
    for a, b in zip(drawn[:3], select._sample(logits[None], 1.5, 50, 7, 3)[:3], strict=True):
        assert torch.equal(a, b)


def test_entries_ascend_and_draws_add_up():
    logits = torch.randn(50, 1000) * 2
    for ids, draws in rows_of(select.sample(logits, temperature=1.0, draws=50, seed=1)):
        assert (ids.diff() > 0).all()
        assert draws.sum() == 50
    for ids, _ in rows_of(select.threshold(logits, temperature=1.0, tau=0.02, seed=1)):
        assert (ids.diff() > 0).all()
        assert len(ids) <= 51
