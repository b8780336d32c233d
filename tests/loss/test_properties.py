"""Property tests: any shape, dtype, mask, vocabulary mismatch and options against the oracle in float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdfast import _C, SoftLabels, alpha_beta, jsd, kd_loss, skew_forward_kl, skew_reverse_kl
from kdfast.divergences import Divergence
from kdfast.testing import ROUNDING, loss_and_gradient, relative_error

COLUMNS = st.one_of(st.integers(3, 40), st.sampled_from([255, 1023, 1024, 1025, 2048, 2100]))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
UNIT = st.floats(0.05, 0.95)
DIVERGENCES = st.one_of(
    st.sampled_from(_C.divergences()).map(Divergence),
    st.sampled_from(_C.divergences()).map(lambda name: Divergence(name, standardize=True)),
    st.builds(jsd, UNIT, st.booleans()),
    st.builds(skew_forward_kl, UNIT),
    st.builds(skew_reverse_kl, UNIT),
    # Their product divides the summand, rounding included.
    st.builds(alpha_beta, st.floats(0.3, 0.95), st.floats(0.3, 0.95)),
)
EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def problems(draw):
    """Logits, labels and options of a finite loss."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, columns = draw(st.integers(1, 5)), draw(COLUMNS)
    other = max(3, columns + draw(st.sampled_from([0, 0, -5, 7, 40])))
    shared = min(columns, other)
    std = draw(st.sampled_from([0.1, 1.0, 5.0]))
    student, teacher = torch.randn(rows, columns) * std, torch.randn(rows, other) * std
    # Both sides mask the same columns; the first three stay, for labels and for dkd.
    masked = torch.rand(shared) < draw(st.sampled_from([0.0, 0.3, 0.97]))
    masked[:3] = False
    student[:, :shared][:, masked] = -math.inf
    teacher[:, :shared][:, masked] = -math.inf
    labels = torch.randint(0, 3, (rows,))
    if draw(st.booleans()):
        labels[0] = -100
    tau, ce_weight = draw(st.sampled_from([0.5, 1.0, 2.0, 3.3])), draw(st.sampled_from([0.0, 0.7]))
    options = {
        "divergence": draw(DIVERGENCES),
        "temperature": torch.rand(rows) + 0.5 if draw(st.booleans()) else tau,
        "teacher_temperature": draw(st.sampled_from([None, 1.0, 2.5])),
        "kd_weight": draw(st.sampled_from([0.0, 1.0, 0.3])),
        "ce_weight": ce_weight,
        "z_weight": draw(st.sampled_from([0.0, 1e-2])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])) if ce_weight else 0.0,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "vocab": "shared",
    }
    return student, teacher, labels, options


@EXAMPLES
@given(problems(), DTYPES, st.sampled_from(["fused", "recompute"]))
def test_any_dense_problem(problem, dtype, backward):
    student, teacher, labels, options = problem
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss, grad = loss_and_gradient(student, teacher, labels, backward=backward, **options)
    exact_loss, exact_grad = _oracle(student.double(), teacher.double(), labels, options)
    eager_loss, eager_grad = _oracle(student, teacher, labels, options)
    # Differences of probabilities, each rounded: a gradient much smaller than they are keeps their absolute error.
    floor = 0.1 / len(student)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = relative_error(eager_grad, exact_grad, floor) + 2 * ROUNDING[wide] + torch.finfo(dtype).eps / 2
    assert relative_error(grad, exact_grad, floor) <= allowed
    # Likewise a loss: tau^2 and the number of rows multiply the rounding of a nat.
    assert relative_error(loss.reshape(-1), exact_loss, floor=1.0) <= 1e-5 + relative_error(eager_loss, exact_loss, 1.0)
    assert (grad[student == -math.inf] == 0.0).all()
    assert (grad[labels == -100] == 0.0).all()


@EXAMPLES
@given(problems(), st.integers(1, 8), st.booleans())
def test_any_sparse_problem(problem, k, tail):
    """Against the dense loss of the distribution that the entries and the tail stand for."""
    student, _, labels, options = problem
    options = {**options, "divergence": "soft_ce", "teacher_temperature": 1.0, "reduction": "sum"}
    rows, columns = student.shape
    live = (student[0] != -math.inf).nonzero()[:, 0]
    ids = torch.stack([live[torch.randperm(len(live))[:k]] for _ in range(rows)])
    # A tail without a live column to fall on would be an infinite loss.
    mass = torch.rand(rows).clamp(0.05, 0.95) if tail and len(live) > ids.shape[1] else torch.zeros(rows)
    p = torch.rand(ids.shape).double() + 0.1
    p = p / p.sum(1, keepdim=True) * (1 - mass[:, None])
    soft = SoftLabels.topk(ids, p.log(), mass.log(), vocab_size=columns)
    ours = loss_and_gradient(student, soft, labels, **options)

    def loss(s):
        tau = torch.as_tensor(options["temperature"], dtype=torch.float64)
        log_q = (s / tau.reshape(-1, 1)).log_softmax(1)
        outside = torch.ones_like(log_q, dtype=torch.bool).scatter(1, ids, False)
        heads = -(p * log_q.gather(1, ids)).sum(1)
        tails = mass * log_q.masked_fill(~outside, -math.inf).logsumexp(1) if mass.any() else 0.0
        kd = options["kd_weight"] * tau**2 * (heads - tails)
        rest = kd_loss(s, s.detach(), labels, **{**options, "kd_weight": 0.0, "divergence": "forward_kl"})
        return torch.where(labels == -100, 0.0, kd).sum() + rest

    leaf = student.double().requires_grad_()
    exact = loss(leaf)
    (grad,) = torch.autograd.grad(exact, leaf)
    assert ours[0].item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)
    assert relative_error(ours[1], grad, floor=0.1) <= 5e-6


def _oracle(student, teacher, labels, options):
    """kd_loss itself, with its kernels replaced by the reference."""
    from kdfast.loss import reference

    leaf = student.clone().requires_grad_()
    tau = torch.as_tensor(options["temperature"], dtype=torch.float64).expand(len(leaf))
    tau_t = tau if options["teacher_temperature"] is None else torch.full_like(tau, options["teacher_temperature"])
    counted = labels != -100
    t2 = 1.0 if options["divergence"].name == "logit_mse" else tau**2
    weight = counted.double()
    weight = weight / weight.sum().clamp(min=1) if options["reduction"] == "mean" else weight
    weights = [options["kd_weight"] * t2, options["ce_weight"], options["z_weight"]]
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    coef = torch.stack([tau, tau_t, *(weight * w for w in weights)]).to(wide)
    targets = reference.Targets(labels, None, options["label_smoothing"])
    loss, _ = reference.dense_rows(leaf, teacher, coef, targets, options["divergence"])
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return (loss if options["reduction"] == "none" else loss.sum().reshape(1)).detach(), grad
