"""The sparse row op against the oracle in float64, gradients first."""

import math

import pytest
import torch

from kdfast import SoftLabels, kd_loss
from kdfast.loss.reference import Targets
from support.sparse_rows import check, coefficients, make_teacher, oracle, run, with_padding

# Below a vector, a tile (1024) and its whole vectors; both vocabularies wider.
SHAPES = [(5, 5), (1000, 1000), (1030, 1023), (1023, 1030), (2500, 2500), (2500, 1024)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.3])
def test_matches_oracle(dtype, tail, tau):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for columns, vocab in SHAPES:
        shared = min(columns, vocab)
        teacher = make_teacher(6, shared, tail=tail)._replace(vocab=vocab)
        labels = Targets(torch.randint(0, columns, (6,)), None, 0.1)
        check(oracle, (torch.randn(6, columns) * 3).to(dtype), teacher, coefficients(6, wide, tau), labels)


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
def test_entries_at_tile_and_vector_edges(tau):
    ids = torch.tensor([0, 15, 16, 1023, 1024, 2047, 2048, 2099] * 6).int()
    teacher = make_teacher(6, 2100, counts=[8] * 6, ids=ids)
    labels = Targets(torch.tensor([0, 1023, 1024, 2099, 5, 16]))
    check(oracle, torch.randn(6, 2100), teacher, coefficients(6, torch.float32, tau), labels)


@pytest.mark.parametrize("gap", [-200.0, 200.0])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_heads_far_from_the_tail(gap, tau):
    """The tail's log-sum-exp is exact when its share of the softmax underflows, and the heads' when theirs does."""
    student = torch.randn(6, 1500)
    ids = torch.stack([torch.randperm(1500)[:4] for _ in range(6)])
    student.scatter_(1, ids, gap)
    teacher = make_teacher(6, 1500, counts=[4] * 6, ids=ids.reshape(-1).int())
    check(oracle, student, teacher, coefficients(6, torch.float32, tau), Targets(torch.randint(0, 1500, (6,))))


def test_tiny_and_whole_tails():
    for log_tail in (-70.0, -1e-6, -math.inf):
        teacher = make_teacher(6, 800)._replace(tail=torch.full((6,), log_tail))
        check(oracle, torch.randn(6, 800), teacher, coefficients(6, torch.float32, 2.0), Targets(torch.arange(6)))


def test_masked_students():
    student, teacher = torch.randn(6, 1300), make_teacher(6, 1300, counts=[3] * 6)
    student[:, 200:400] = -math.inf
    kept = torch.stack([torch.arange(i, i + 3) * 100 + 450 for i in range(6)])
    teacher = teacher._replace(ids=kept.reshape(-1).int())
    check(oracle, student, teacher, coefficients(6, torch.float32, 2.0), Targets(torch.full((6,), 1299), None, 0.1))
    # Teacher mass on a masked column is an infinite divergence, and nobody's gradient at the mask.
    loss, grad, _ = run(
        student,
        teacher._replace(ids=(kept * 0 + 250).int().reshape(-1)),
        torch.ones(5, 6),
        Targets(torch.full((6,), 3)),
    )
    assert (loss == math.inf).all()
    assert (grad[:, 200:400] == 0.0).all()


@pytest.mark.parametrize("tail", [True, False])
def test_padding_is_as_if_it_were_not_there(tail):
    student, teacher = torch.randn(6, 1030), make_teacher(6, 1030, tail=tail, counts=[0, 1, 2, 5, 9, 3])
    label, coef = torch.randint(0, 1030, (6,)), coefficients(6, torch.float32, 2.0)
    label[3] = teacher.ids[5]  # an entry's
    padded = with_padding(teacher, label, 1030)
    clean, same = (run(student, x, coef, Targets(label, None, 0.1)) for x in (teacher, padded))
    for a, b in zip(clean, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_bad_ids_make_their_own_row_nan():
    for bad in (-1, 1000, 2**31 - 1):
        teacher = make_teacher(3, 1000, counts=[2] * 3)
        teacher.ids[2] = bad
        loss, grad, _ = run(torch.randn(3, 1000), teacher, torch.ones(5, 3), Targets(torch.zeros(3, dtype=torch.long)))
        assert torch.equal(loss.isnan(), torch.tensor([False, True, False]))
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_entry_is_the_dense_loss(temperature, dtype):
    student, teacher = torch.randn(5, 300).to(dtype).requires_grad_(), torch.randn(5, 300).double()
    log_probs, ids = teacher.log_softmax(1).topk(300)
    labels = SoftLabels.topk(ids, log_probs, torch.full((2, 5), -math.inf), vocab_size=300, temperatures=(1.0, 2.0))
    sparse = kd_loss(student, labels, temperature=temperature)
    dense = kd_loss(student, teacher, temperature=temperature)
    assert sparse.item() == pytest.approx(dense.item(), rel=1e-5)
    (a,), (b,) = (torch.autograd.grad(loss, student) for loss in (sparse, dense))
    assert (a - b).abs().max() <= 1e-5 * b.abs().max() + (b.abs().max() / 128 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_tail_bucket_is_the_exact_coarse_graining(temperature):
    """KL over (entries, everything else), which is a lower bound of the whole KL."""
    student, teacher = torch.randn(4, 500).double(), torch.randn(4, 500).double() * 2
    log_probs, ids = teacher.log_softmax(1).topk(8)
    tails = torch.stack([_log_mass_outside(teacher / t, ids) for t in (1.0, 2.0, 4.0)])
    labels = SoftLabels.topk(ids, log_probs, tails, vocab_size=500, temperatures=(1.0, 2.0, 4.0))
    p, q = ((x / temperature).softmax(1) for x in (teacher, student))
    buckets_p, buckets_q = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], 1) for x in (p, q))
    expected = (buckets_p * (buckets_p / buckets_q).log()).sum(1) * temperature**2
    actual = kd_loss(student, labels, temperature=temperature, reduction="none")
    assert torch.allclose(actual, expected, rtol=1e-5)
    assert (actual <= kd_loss(student, teacher, temperature=temperature, reduction="none") + 1e-9).all()


def test_unnormalised_weights_are_unbiased_in_the_gradient():
    """Averaged over draws, the sampled gradient is the dense one."""
    torch.manual_seed(1)
    student, teacher = torch.randn(1, 30).double(), torch.randn(1, 30).double() * 2
    draws = torch.multinomial(teacher.softmax(1)[0], 40000, replacement=True).view(20000, 2)
    same = draws[:, 0] == draws[:, 1]
    # Two draws of one token are one entry of twice the weight.
    weights = torch.where(same[:, None], torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
    ids = torch.stack([draws[:, 0], torch.where(same, (draws[:, 0] + 1) % 30, draws[:, 1])], 1)
    labels = SoftLabels.weights(ids, weights, vocab_size=30)
    leaf = student.expand(20000, 30).clone().requires_grad_()
    (sampled,) = torch.autograd.grad(kd_loss(leaf, labels, divergence="soft_ce"), leaf)
    dense = student.softmax(1) - teacher.softmax(1)
    assert (sampled.sum(0) - dense[0]).abs().max() < 0.01


def _log_mass_outside(logits, ids):
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    return logits.log_softmax(1).masked_fill(inside, -math.inf).logsumexp(1)
