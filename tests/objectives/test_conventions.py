"""docs/conventions.md: the authors' formulas, written out, against what they are here."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from kdfast import Divergence, alpha_beta, jsd, kd_loss, skew_forward_kl
from kdfast.distill import Step
from kdfast.objectives import attention_transfer, dist_loss, pkt
from kdfast.recipes import label_trust
from kdfast.recipes.tasks import ranking_distillation
from support import ROOT

N, C, T = 8, 10, 2.0


@pytest.fixture
def sides():
    """A student that is trained, its teacher, and labels."""
    student = torch.randn(N, C, dtype=torch.float64).requires_grad_()
    return student, 2 * torch.randn(N, C, dtype=torch.float64), torch.randint(0, C, (N,))


def same(ours, theirs, leaf, rtol=1e-9):
    """Values and gradients agree."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    same_gradient(ours, theirs, leaf, rtol)


def same_gradient(ours, theirs, leaf, rtol=1e-9):
    (a,), (b,) = (torch.autograd.grad(loss, leaf, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


def test_the_page_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "conventions.md").read_text("utf-8")))
    assert named == {name for name in globals() if name.startswith("test_")} - {"test_the_page_names_tests_that_exist"}


# ---- another constant -----------------------------------------------------------------------------------------------


def test_pkt():
    student, teacher = torch.randn(64, 32, dtype=torch.float64), torch.randn(64, 48, dtype=torch.float64)

    def probabilities(x):
        x = F.normalize(x)
        kernel = (x @ x.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)

    q, p = probabilities(student), probabilities(teacher)
    theirs = (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()
    assert (pkt(student, teacher) / theirs).item() == pytest.approx(64**2 / 63, rel=0.03)


def test_attention_transfer():
    student = torch.randn(4, 6, 8, 8, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(4, 5, 4, 4, dtype=torch.float64)
    pooled = F.adaptive_avg_pool2d(student, (4, 4))

    def attention(x):
        return F.normalize(x.pow(2).mean(1).flatten(1))

    theirs = (attention(pooled) - attention(teacher)).pow(2).mean()
    same(attention_transfer(pooled, teacher) / 16, theirs, student)
    assert not torch.isclose(attention_transfer(student, teacher) / 16, theirs, rtol=1e-3)


def test_label_trust(sides):
    student, _, y = sides
    teachers = tuple(torch.randn(N, C, dtype=torch.float64) for _ in range(3))
    losses = torch.stack([F.cross_entropy(z, y, reduction="none") for z in teachers])
    weights = (1 - losses.softmax(0)) / (3 - 1)
    kl = [F.kl_div(student.log_softmax(1), z.softmax(1), reduction="none").sum(1) for z in teachers]
    theirs = (weights * torch.stack(kl)).sum() / (N * 3)
    ours = label_trust(Step(student, teachers, y))
    mean = sum(w[:, None] * z.softmax(1) for w, z in zip(ours.unbind(-1), teachers, strict=True))
    same_gradient(kd_loss(student, mean.log()) / 3, theirs, student)


def test_ranking_distillation():
    student, teacher = torch.randn(1, 20, dtype=torch.float64).requires_grad_(), torch.randn(1, 20).double()
    top, place = teacher.topk(6).indices, torch.arange(6).double()
    static = (-place / 10).exp()
    static = static / static.sum()
    rank = (student.detach()[:, None] > student.detach().gather(1, top)[..., None]).sum(-1)
    dynamic = (0.1 * (rank - place)).clamp(min=0).tanh()
    theirs = -(static * dynamic * F.logsigmoid(student.gather(1, top))).sum()
    same(ranking_distillation(student, teacher, k=6) * (static * dynamic).sum(), theirs, student)


def test_distillm(sides):
    student, teacher, _ = sides
    q, p, lam = student.softmax(1), teacher.softmax(1), 0.1
    m = (1 - lam) * p + lam * q
    kl = [(x * (x / m).log()).sum(1).mean() for x in (q, p)]
    same(kd_loss(student, teacher, divergence=jsd(1 - lam)), lam * kl[0] + (1 - lam) * kl[1], student)
    skewed = -(p * (lam * p + (1 - lam) * q).log()).sum(1).mean()
    ours = kd_loss(student, teacher, divergence=skew_forward_kl(lam))
    same_gradient(ours, skewed, student)
    torch.testing.assert_close(ours - (p * p.log()).sum(1).mean(), skewed, rtol=1e-9, atol=0)


def test_logit_standardization(sides):
    student, teacher, _ = sides

    def normalize(z):
        return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))

    q, p = (normalize(z) / T for z in (student, teacher))
    theirs = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean") * T**2
    standardized = Divergence("forward_kl", standardize=True)
    tau = T * math.sqrt(C / (C - 1))
    ours = kd_loss(student, teacher, divergence=standardized, temperature=tau, kd_weight=(C - 1) / C)
    same(ours, theirs, student, rtol=1e-4)  # the 1e-7


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.5), (0.5, 0.0), (0.5, -0.5), (0.0, 0.0)])
def test_alpha_beta_is_continuous(sides, a, b):
    student, teacher, _ = sides
    near = kd_loss(student, teacher, divergence=alpha_beta(a + 1e-5, b + 1e-5))
    torch.testing.assert_close(kd_loss(student, teacher, divergence=alpha_beta(a, b)), near, rtol=1e-3, atol=0)


def test_dist(sides):
    student, teacher, _ = sides

    def correlation(x, y):
        x, y = (z - z.mean(-1, keepdim=True) for z in (x, y))
        return F.cosine_similarity(x, y, dim=-1, eps=1e-8)

    q, p = (student / T).softmax(1), (teacher / T).softmax(1)
    theirs = T**2 * (1 - correlation(q, p).mean()) + T**2 * (1 - correlation(q.T, p.T).mean())
    same(T**2 * dist_loss(student, teacher, temperature=T), theirs, student, rtol=1e-6)


def test_jsd_is_symmetric_to_rounding():
    s, t = torch.randn(64, 1000), torch.randn(64, 1000)
    torch.testing.assert_close(kd_loss(s, t, divergence="jsd"), kd_loss(t, s, divergence="jsd"), rtol=1e-6, atol=0)


# ---- expressible ----------------------------------------------------------------------------------------------------


def test_multi_label(sides):
    student, teacher, _ = sides
    pairs = [torch.stack([z, torch.zeros_like(z)], -1) for z in (student, teacher)]
    theirs = F.binary_cross_entropy_with_logits(student / T, (teacher / T).sigmoid()) * T**2
    same(kd_loss(*pairs, divergence="soft_ce", temperature=T), theirs, student)


def test_weighted_soft_labels(sides):
    student, teacher, y = sides
    soft = -((teacher / T).softmax(1) * (student / T).log_softmax(1)).sum(1) * T**2
    ratio = F.cross_entropy(student.detach(), y, reduction="none") / F.cross_entropy(teacher, y, reduction="none")
    w = 1 - torch.exp(-ratio)
    theirs = F.cross_entropy(student, y) + 2.5 * (w * soft).mean()
    ours = kd_loss(student, teacher, y, divergence="soft_ce", temperature=T, kd_weight=2.5 * w, ce_weight=1.0)
    same(ours, theirs, student)


def test_nkd(sides):
    student, teacher, y = sides
    gamma, at = 1.5, y[:, None]
    p_y = teacher.softmax(-1).gather(-1, at)[:, 0]
    kept = torch.ones(N, C, dtype=torch.bool).scatter(1, at, False)
    q, p = (z[kept].view(N, C - 1) / T for z in (student, teacher))
    of_others = -(p.softmax(1) * q.log_softmax(1)).sum(1).mean() * gamma * T**2
    theirs = -(p_y * student.log_softmax(1).gather(1, at)[:, 0]).mean() + of_others
    others = [z.scatter(-1, at, -torch.inf) for z in (student, teacher)]
    ours = kd_loss(student, teacher, y, kd_weight=0.0, ce_weight=p_y)
    ours = ours + kd_loss(*others, divergence="soft_ce", temperature=T, kd_weight=gamma)
    same(ours, theirs, student)
    in_one_call = kd_loss(student, teacher, y, divergence=Divergence("dkd", 0.0, gamma), temperature=T)
    same_gradient(in_one_call, of_others, student)


def test_acceptance(sides):
    student, teacher, _ = sides
    q, p, eta = student.softmax(1), teacher.softmax(1), 3.0
    accepted = torch.minimum(p, q).sum(1)
    ours = 1 - kd_loss(student, teacher, divergence="tvd", reduction="none")
    same(-ours.log().mean(), -accepted.log().mean(), student)
    lam = torch.exp(-eta * accepted.detach())
    theirs = (lam * (p * (p / q).log()).sum(1) + (1 - lam) * (1 - accepted)).mean()
    lam = torch.exp(-eta * ours.detach())
    ours = kd_loss(student, teacher, kd_weight=lam) + kd_loss(student, teacher, divergence="tvd", kd_weight=1 - lam)
    same(ours, theirs, student)


def test_a_mixture_of_teacher_and_label(sides):
    student, teacher, y = sides
    a = torch.rand(N, dtype=torch.float64)
    target = a[:, None] * teacher.softmax(1) + (1 - a)[:, None] * F.one_hot(y, C)
    theirs = F.cross_entropy(student, target)
    same(kd_loss(student, teacher, y, divergence="soft_ce", kd_weight=a, ce_weight=1 - a), theirs, student)


def test_a_subset_of_the_classes(sides):
    student, teacher, _ = sides
    subset = torch.arange(C) % 3 == 0
    theirs = F.kl_div(student[:, subset].log_softmax(1), teacher[:, subset].softmax(1), reduction="batchmean")
    same(kd_loss(*(z.masked_fill(~subset, -torch.inf) for z in (student, teacher))), theirs, student)


def test_symmetric_kl_of_any_ratio(sides):
    student, teacher, _ = sides
    lq, lp = student.log_softmax(1), teacher.log_softmax(1)
    theirs = (0.3 * (lp.exp() * (lp - lq)).sum(1) + 0.9 * (lq.exp() * (lq - lp)).sum(1)).mean()
    ours = 0.3 * kd_loss(student, teacher) + 0.9 * kd_loss(student, teacher, divergence="reverse_kl")
    same(ours, theirs, student)
