"""The Triton kernels that choose columns: the CPU ops' law, and their entries where no rounding decides.

Tiles are small, so that small rows have several.
"""

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kdfast import _triton
from kdfast.cache.selection import select
from kdfast.kernels import select_threshold, select_top
from support.select_checks import assert_threshold_row, assert_top, probabilities, rows_of
from support.triton_device import DEVICE

# The interpreter computes with NumPy, which warns of a hash's overflow and of inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for module in (select_threshold, select_top):
        monkeypatch.setattr(module, "BLOCK", 128)


def make_rows(dtype, vocab, rows=6):
    """A masked row, a uniform one, ties, climbs, and a lonely column."""
    logits = torch.randn(rows, vocab) * 3
    logits[0] = logits[0].masked_fill(torch.rand(vocab) < 0.5, -math.inf)
    logits[0, vocab // 2] = 0.0
    logits[1] = 0.0
    logits[2] = (logits[2] * 2).round() / 2
    logits[3] = torch.linspace(-30, 30, vocab)
    logits[4] = -math.inf
    logits[4, vocab - 1] = -300.0
    return logits.to(dtype)


def threshold(logits, temperature=1.0, tau=0.02, seed=5, first_row=3):
    out = select_threshold.select_threshold(logits[None].to(DEVICE), temperature, tau, seed, first_row)
    return select.Thresholded(*(x.cpu() for x in out))


# ---- threshold ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "temperature"), [(1, 1.0), (2, 0.7), (127, 1.0), (128, 1.3), (700, 1.0)])
def test_threshold_obeys_the_law(dtype, vocab, temperature):
    logits = make_rows(dtype, vocab)
    for tau, seed in ((1.0, -(2**63)), (0.25, 1), (0.02, 2**63 - 1), (1e-4, 17)):
        out = threshold(logits, temperature, tau, seed)
        torch.testing.assert_close(out.lse, (logits.double() / temperature).logsumexp(1).float(), rtol=1e-6, atol=1e-5)
        for row, (ids, probs) in enumerate(rows_of(out)):
            assert len(ids)
            offset = select.uniforms(seed, 3 + row, 1)[0, 0]
            assert_threshold_row(probabilities(logits[row], temperature), ids, probs, tau, offset)


def test_threshold_keeps_what_the_cpu_keeps():
    logits = torch.randn(10, 1500) * 3
    ours, cpu = threshold(logits, 1.5), select.threshold(logits, temperature=1.5, tau=0.02, seed=5, first_row=3)
    assert torch.equal(ours.counts, cpu.counts)
    assert torch.equal(ours.ids, cpu.ids)
    torch.testing.assert_close(ours.probs, cpu.probs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tau", [0.3, 0.11])
def test_thresholds_expectation_is_the_softmax(tau):
    """Over the offset, what is kept is piecewise constant: a row with an offset in each piece gives the integral."""
    logits = torch.randn(1, 9) * 2
    p = probabilities(logits[0])
    low = np.where(p > tau, 0.0, p)
    breaks = np.unique(np.concatenate([[0.0, 1.0], (low.cumsum() / tau) % 1]))
    offsets = select.uniforms(0, 0, 20000)[:, 0]
    mean = np.zeros(9)
    for a, b in itertools.pairwise(breaks):
        row = int(np.abs(offsets - (a + b) / 2).argmin())
        assert a < offsets[row] < b
        out = threshold(logits, tau=tau, seed=0, first_row=row)
        mean[out.ids] += (b - a) * out.probs.numpy()
    np.testing.assert_allclose(mean, p, atol=1e-6)


def test_ids_beyond_16_and_17_bits(monkeypatch):
    monkeypatch.setattr(select_threshold, "BLOCK", 2048)
    logits = torch.full((1, 2**17 + 300), -9.0)
    logits[0, [2**16 - 1, 2**16 + 1, 2**17 - 1, 2**17 + 5, 2**17 + 299]] = 5.0
    ours, cpu = threshold(logits), select.threshold(logits, temperature=1.0, tau=0.02, seed=5, first_row=3)
    assert torch.equal(ours.ids, cpu.ids)
    assert int(ours.ids.max()) == 2**17 + 299


def test_uniform_rows_keep_one_column_of_each_stretch():
    out = threshold(torch.full((20, 1000), 1e9), tau=0.05)
    assert (out.counts == 20).all()
    assert (out.ids.view(20, 20) // 50 == torch.arange(20)).all()
    assert len(out.ids[:20].unique()) == 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 499, slice(None)])
def test_a_bad_row_has_no_entries_and_harms_no_other(bad, at):
    logits = torch.randn(3, 500)
    whole = rows_of(threshold(logits))
    logits[1, at] = bad
    out = threshold(logits)
    if bad > -math.inf or at == slice(None):
        assert out.counts[1] == 0
        assert out.lse.isnan().tolist() == [False, True, False]
    for row in (0, 2):
        assert (rows_of(out)[row][0] == whole[row][0]).all()


def test_threshold_does_not_depend_on_batch_strides_or_tiles(monkeypatch):
    logits = torch.randn(7, 300)
    whole = threshold(logits)
    wide = torch.full((14, 401), math.nan)
    wide[::2, 50:350] = logits
    parts = [threshold(part, first_row=3 + begin) for begin, part in ((0, logits[:1]), (1, logits[1:]))]
    outs = [threshold(wide[::2, 50:350]), [torch.cat(tensors) for tensors in zip(*parts, strict=True)]]
    folded = select_threshold.select_threshold(logits[:6].view(2, 3, 300).to(DEVICE), 1.0, 0.02, 5, 3)
    outs.append([torch.cat([x.cpu(), y]) for x, y in zip(folded, threshold(logits[6:], first_row=9), strict=True)])
    monkeypatch.setattr(select_threshold, "BLOCK", 32)
    outs.append(threshold(logits))
    for out in outs:
        assert torch.equal(out[0], whole.ids)
        assert torch.equal(out[2], whole.counts)
        torch.testing.assert_close(out[1], whole.probs, rtol=1e-6, atol=0)
    assert [len(x) for x in threshold(logits[:0])] == [0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures_are_argmax_and_uniform(temperature):
    out = threshold(torch.arange(200.0).expand(3, -1), temperature)
    assert (out.counts == (1 if temperature < 1 else 50)).all()
    assert (out.ids == 199).all() or temperature > 1


def test_a_grid_finer_than_rounding_keeps_every_column():
    logits = torch.randn(2, 300)
    for tau in (1e-17, 1e-300):
        out = threshold(logits, tau=tau)
        assert out.counts.tolist() == [300, 300]
        np.testing.assert_allclose(out.probs.view(2, 300), probabilities(logits), rtol=3e-6)


# ---- top ------------------------------------------------------------------------------------------------------------


def top(logits, temperature=1.0, k=3):
    out = select_top.select_top(logits[None].to(DEVICE), temperature, k)
    return select.Top(*(x.cpu() for x in out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (2, 1), (127, 3), (128, 8), (700, 2)])
def test_the_likeliest_columns_and_the_rest(dtype, vocab, k):
    logits = make_rows(dtype, vocab)
    assert_top(top(logits, 1.3, k), logits, 1.3, k)


def test_the_likeliest_columns_may_all_lie_in_few_groups():
    """The second sweep notes hundreds of columns then: the sort takes them in turns."""
    logits = torch.randn(2, 3000)
    logits[0, ::256] += 9.0
    logits[1, ::32] += 9.0
    assert_top(top(logits, k=3), logits, 1.0, 3)
    assert_top(top(logits[:1], k=64), logits[:1], 1.0, 64)


@pytest.mark.parametrize("k", [9, 64])
def test_many_likeliest_columns(k):
    logits = make_rows(torch.bfloat16, 300)[[0, 2]]
    assert_top(top(logits, 1.3, k), logits, 1.3, k)


def test_zeros_of_either_sign_tie():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]])
    assert top(logits, k=3).ids.tolist() == [[1, 2, 3]]


def test_a_rest_far_below_1_keeps_its_digits():
    logits = torch.full((1, 1000), -30.0)
    logits[0, 500] = 0.0
    rest = top(logits, k=1).rest.item()
    torch.testing.assert_close(rest, 999 * math.exp(-30) / (1 + 999 * math.exp(-30)), rtol=3e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_has_no_likeliest_column_and_harms_no_other(bad):
    logits = torch.randn(3, 500)
    whole = top(logits)
    logits[1, slice(None) if bad == -math.inf else 300] = bad
    out = top(logits)
    assert out.lse.isnan().tolist() == [False, True, False]
    assert not out.probs[1].any()
    assert not out.ids[1].any()
    for row in (0, 2):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(out, whole, strict=True))


@pytest.mark.parametrize("at", [0, 400, 499])
def test_top_columns_behind_a_lead_that_exponentials_do_not_reach(at):
    logits = torch.randn(3, 500) * 20 - 200
    logits[0, :250] = -math.inf
    logits[1, 2:] = -math.inf
    logits[:, at] = 0.0
    for k in (1, 5, 20):
        assert_top(top(logits, k=k), logits, 1.0, k)


def test_top_does_not_depend_on_batch_or_strides():
    logits = torch.randn(4, 300)
    whole = top(logits)
    wide = torch.full((8, 401), math.nan)
    wide[::2, 50:350] = logits
    folded = select_top.select_top(logits.view(2, 2, 300).to(DEVICE), 1.0, 3)
    for out in (top(wide[::2, 50:350]), folded):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(out, whole, strict=True))
    assert [tuple(x.shape) for x in top(logits[:0], k=5)] == [(0, 5), (0, 5), (0,), (0,)]


# ---- where kernels run ----------------------------------------------------------------------------------------------


def test_the_ops_on_a_gpu_are_the_kernels(monkeypatch):
    """Except where none is for the arguments, or Triton is missing."""
    logits = torch.randn(1, 3, 300, device=DEVICE)
    ran = []
    monkeypatch.setattr(select, "kernel", lambda name: ran.append(name) or _triton.kernel(name))
    runs = (
        lambda x: select._threshold_on_gpu(x, 1.0, 0.02, 5, 0),
        lambda x: select._top_on_gpu(x, 1.0, 3),
    )
    whole = [run(logits) for run in runs]
    assert ran == ["select_threshold", "select_top"]
    select._top_on_gpu(logits, 1.0, 0)
    select._top_on_gpu(logits, 1.0, select.MOST_IN_KERNEL + 1)
    for run in runs:
        run(logits.double())
    assert len(ran) == 2
    assert select.MOST_IN_KERNEL == select_top.MOST
    monkeypatch.setattr(select, "kernel", lambda name: None)
    for run, out in zip(runs, whole, strict=True):
        assert torch.equal(run(logits)[0], out[0])
    assert _triton.kernel("select_threshold") is _triton.kernel("select_threshold")
