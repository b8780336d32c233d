"""The dense row op's laws, for every kernel of it: an ``op`` is its form that computes the gradient, too."""

import math

import torch

from kdfast import _C, alpha_beta, dkd, jsd, skew_forward_kl, skew_reverse_kl
from kdfast.divergences import Divergence
from kdfast.loss import ops
from kdfast.loss.reference import Targets
from kdfast.testing import assert_close_to_eager, oracle_gradient

DIVERGENCES = [
    *(Divergence(name) for name in _C.divergences()),
    jsd(0.05),
    jsd(0.9),
    jsd(0.0, normalize=True),
    jsd(1e-4, normalize=True),
    jsd(0.9999, normalize=True),
    jsd(1.0, normalize=True),
    skew_forward_kl(0.0),
    skew_forward_kl(0.7),
    skew_reverse_kl(1e-4),
    skew_reverse_kl(0.99),
    skew_forward_kl(0.99),
    skew_reverse_kl(0.7),
    alpha_beta(1.0, 0.5),
    alpha_beta(0.5, 0.0),
    alpha_beta(0.0, 0.5),
    alpha_beta(0.5, -0.5),
    alpha_beta(0.0, 0.0),
    *(Divergence(name, standardize=True) for name in _C.divergences()),
]
# Finite divergence whatever the teacher masks.
TEACHER_MAY_MASK = {
    *("forward_kl", "soft_ce", "jsd", "skew_forward_kl", "tvd", "dkd", "logit_mse"),
    *("squared_hellinger", "pearson_chi2"),
}


def coefficients(rows, dtype, tau_s=1.0, tau_t=1.5):
    """Per-row weights of every sign that a user may give, with each term left out somewhere."""
    coef = torch.rand(5, rows, dtype=torch.float64) + 0.2
    coef[0], coef[1] = tau_s, tau_t
    coef[4] *= 0.1
    coef[2, 1] = coef[3, 2] = coef[4, 3] = 0.0
    coef[2:, 4] = 0.0
    return coef.to(dtype)


def run(op, student, teacher, coef, labels, divergence):
    """Loss, gradient and parts through the op that computes all three."""
    labels = labels._replace(probs=None if labels.probs is None else labels.probs[None])
    arguments = ops.DenseTeacher(teacher[None], divergence).arguments(coef, labels, True)
    loss, grad, parts = op(student[None], *arguments)
    return loss, grad[0], parts


def check(op, student, teacher, coef, labels, divergence):
    dtype = student.dtype
    loss, grad, parts = run(op, student, teacher, coef, labels, divergence)
    eager_loss, eager_grad, eager_parts = oracle_gradient(student, teacher, coef, labels, divergence)
    exact_loss, exact_grad, exact_parts = oracle_gradient(
        student.double(), teacher.double(), coef.double(), labels, divergence
    )
    assert_close_to_eager("gradient", grad, eager_grad, exact_grad, dtype)
    # The loss leaves the kernel in float32 however narrow the logits are.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close_to_eager("loss", loss, eager_loss, exact_loss, wide, floor=1.0)
    for name, part, eager, exact in zip(exact_parts._fields, parts, eager_parts, exact_parts, strict=True):
        assert_close_to_eager(name, part, eager, exact, wide, floor=1.0)


def masked_vocabulary(op, divergence, dtype, s, t, device="cpu"):
    """Whole leading tiles, and a column inside the last partial vector, on both sides."""
    shared = min(s, t)
    dead = torch.zeros(max(s, t), dtype=torch.bool)
    dead[: 2 * shared // 3] = True
    dead[shared - 1] = True
    student, teacher = torch.randn(6, s), torch.randn(6, t)
    if divergence.canonical().name in TEACHER_MAY_MASK:
        teacher[:, shared - 3] = -math.inf
    student[:, dead[:s]] = -math.inf
    teacher[:, dead[:t]] = -math.inf
    student, teacher = student.to(device, dtype), teacher.to(device, dtype)
    target = torch.full((6,), shared - 2, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check(op, student, teacher, coefficients(6, wide, 2.0).to(device), Targets(target, None, 0.1), divergence)
    _, grad, _ = run(op, student, teacher, coefficients(6, wide).to(device), Targets(target), divergence)
    assert (grad[:, dead[:s]] == 0.0).all()


def masked_from_the_start(run, divergence, columns, tau, dtype=torch.float32, device="cpu"):
    """The first columns masked, on the teacher's side where that is finite, else on both, and the others far from 0."""
    if divergence.name.endswith("chi2"):
        tau = max(tau, 1.0)  # below, ratios of probabilities leave the range
    student, teacher = (torch.randn(6, columns, dtype=torch.float64) * 3 for _ in range(2))
    student += torch.tensor([0.0, 150, -150, 1e4, -1e4, -14])[:, None]
    teacher += torch.tensor([-150, 0, -1e4, 150, 1e4, -14])[:, None]
    first = columns // 2
    teacher[:, :first] = -math.inf
    student[:2, :first] = -math.inf
    if divergence.canonical().name not in TEACHER_MAY_MASK or divergence.standardize:
        student[:, :first] = -math.inf
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    coef = torch.tensor([[tau], [tau], [1.0], [0.0], [0.0]], dtype=wide, device=device).repeat(1, 6)
    labels = Targets(torch.full((6,), columns - 1, device=device))
    student, teacher = student.to(device, dtype), teacher.to(device, dtype)
    loss, grad, *_ = run(student, teacher, coef, labels, divergence)
    eager_loss, eager_grad, _ = oracle_gradient(student, teacher, coef, labels, divergence)
    exact_loss, exact_grad, _ = oracle_gradient(student.double(), teacher.double(), coef.double(), labels, divergence)
    rounding = 1e-11 if dtype == torch.float64 else 1e-5
    size = exact_loss.abs().clamp(min=1.0)
    assert ((loss - exact_loss).abs() <= rounding * size + 2 * (eager_loss - exact_loss).abs()).all()
    size = (size / min(tau, 1.0)).maximum(exact_grad.abs().amax(1))[:, None]
    eager_error = (eager_grad - exact_grad).abs().amax(1, keepdim=True)
    assert ((grad - exact_grad).abs() <= rounding * size + 2 * eager_error).all()


def a_term_of_weight_0_is_left_out(op, columns, device="cpu"):
    """dkd's, where it is infinite: a student that masks the label, or a class that the teacher does not."""
    student, teacher = torch.randn(2, columns, device=device), torch.randn(2, columns, device=device)
    labels = Targets(torch.tensor([0, 1], device=device))
    student[:, 0] = -math.inf
    coef = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]], device=device).repeat(1, 2)
    for row, divergence in ((0, dkd(0.0, 2.0)), (1, dkd(2.0, 0.0))):
        loss, grad, _ = run(op, student, teacher, coef, labels, divergence)
        exact_loss, exact_grad, _ = oracle_gradient(
            student.double(), teacher.double(), coef.double(), labels, divergence
        )
        for x, exact in ((loss, exact_loss), (grad, exact_grad)):
            assert x[row].isfinite().all()
            torch.testing.assert_close(x[row].double(), exact[row], rtol=1e-5, atol=1e-6)
        assert run(op, student, teacher, coef, labels, dkd(1.0, 1.0))[0][row] == math.inf


def infinite_divergence(op, divergence, masked, gap, columns, device="cpu"):
    student, teacher = torch.randn(2, columns, device=device), torch.randn(2, columns, device=device)
    # Even where the other side's probability there underflows.
    (student if masked == "student" else teacher)[0, 3] = -math.inf
    (teacher if masked == "student" else student)[0, 3] = -gap
    coef = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]], device=device).repeat(1, 2)
    loss, grad, _ = run(op, student, teacher, coef, Targets(), Divergence(divergence))
    assert loss[0] == math.inf
    assert loss[1].isfinite()
    assert grad.isfinite().all()
    assert (grad[0, student[0] == -math.inf] == 0.0).all()


def nan_and_inf_reach_their_row_only(op, bad, side, dtype, divergence, columns, at, device="cpu"):
    student, teacher = torch.randn(3, columns).to(device, dtype), torch.randn(3, columns).to(device, dtype)
    {"student": student, "teacher": teacher}[side][1, at] = bad
    coef = torch.tensor([[2.0], [2.0], [1.0], [0.5], [0.0]], device=device).repeat(1, 3)
    labels = Targets(torch.zeros(3, dtype=torch.long, device=device))
    loss, grad, _ = run(op, student, teacher, coef, labels, Divergence(divergence))
    if divergence == "logit_mse" and bad == math.inf and side == "teacher":
        assert loss[1] == math.inf
    else:
        assert loss.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().all()
    assert grad[0].isfinite().all()
    assert grad[2].isfinite().all()


def rows_that_do_not_count_are_exact_zeros(op, dtype, columns, device="cpu"):
    student = torch.full((4, columns), math.nan, dtype=dtype, device=device)
    teacher = torch.full((4, columns), math.inf, dtype=dtype, device=device)
    labels = Targets(torch.full((4,), -100, device=device))
    for x in run(op, student, teacher, torch.zeros(5, 4, device=device), labels, Divergence("jsd")):
        assert (x == 0.0).all()


def rows_without_a_finite_column_are_exact_zeros(op, name, columns, device="cpu"):
    dead, alive = torch.full((2, columns), -math.inf, device=device), torch.randn(2, columns, device=device)
    coef = torch.tensor([[2.0], [2.0], [1.0], [0.0], [0.0]], device=device).repeat(1, 2)
    labels = Targets(torch.zeros(2, dtype=torch.long, device=device))
    for student, teacher in ((dead, alive), (alive, dead), (dead, dead)):
        loss, grad, _ = run(op, student, teacher, coef, labels, Divergence(name))
        assert (loss == 0.0).all(), name
        assert (grad == 0.0).all(), name


def extreme_logits(op, dtype, divergence, columns, device="cpu"):
    """Dominant columns far from a tile's first vector, large offsets, no spread."""
    base = torch.randn(6, columns)
    base[0, 3 * columns // 4] += 200.0
    base[1, 40] += 1000.0
    base[2, columns - 1] += 90.0
    base[3] += 5000.0
    base[4] = 7.0
    base[5, :16] -= 300.0
    student, teacher = base.to(device, dtype), base.flip(1).to(device, dtype)
    labels = Targets(torch.tensor([3 * columns // 4, 3, columns - 1, 5, 6, 100], device=device))
    check(op, student, teacher, coefficients(6, torch.float32, 2.0).to(device), labels, Divergence(divergence))


def huge_logits(op, value, columns, device="cpu"):
    """A row of one huge logit, or of nothing else."""
    student = torch.full((6, columns), value if value < 0 else 0.0, device=device)
    if value > 0:
        student[:, columns - 1] = value
    labels = Targets(torch.full((6,), columns - 1, device=device))
    coef = torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.0]], device=device).repeat(1, 6)
    loss, grad, _ = run(op, student, student.clone(), coef, labels, Divergence("forward_kl"))
    expected = 0.0 if value > 0 else math.log(columns)
    assert torch.allclose(loss, torch.full((6,), expected, device=device), atol=1e-5)
    assert grad.isfinite().all()


def finite_masks(op, name, columns, device="cpu"):
    """The lowest finite number masks as -inf does, as long as the other side agrees."""
    student, teacher = torch.randn(6, columns, device=device), torch.randn(6, columns, device=device)
    results, labels = [], Targets(torch.arange(6, device=device))
    for mask in (torch.finfo(torch.float32).min, -math.inf):
        student[:, 20 : 5 * columns // 6] = teacher[:, 20 : 5 * columns // 6] = mask
        coef = torch.full((5, 6), 1.5, device=device)
        results.append(run(op, student, teacher, coef, labels, Divergence(name)))
    for finite, infinite in zip(*results, strict=True):
        assert torch.allclose(finite, infinite, rtol=1e-5, atol=1e-7)


def identical_sides_have_no_gradient(op, name, columns, device="cpu"):
    student = torch.randn(5, columns, device=device) * 4
    coef = torch.tensor([[2.0], [2.0], [1.0], [0.0], [0.0]], device=device).repeat(1, 5)
    labels = Targets(torch.arange(5, device=device))
    loss, grad, _ = run(op, student, student.clone(), coef, labels, Divergence(name))
    assert grad.abs().max() < 1e-7
    if name != "soft_ce":
        # alpha_beta divides the rounding of its three powers by a b = 0.14.
        assert loss.abs().max() < (1e-5 if name == "alpha_beta" else 1e-6)


def small_gap_keeps_its_gradient(op, name, columns, device="cpu"):
    """Late in training the sides nearly agree: the difference must not be lost in the softmaxes' rounding."""
    student = torch.randn(6, columns, device=device) * 10
    teacher = student + torch.randn(6, columns, device=device) * 1e-3
    check(
        op, student, teacher, torch.ones(5, 6, device=device), Targets(torch.arange(6, device=device)), Divergence(name)
    )


def class_probabilities(op, smoothing, dtype, tau, columns, device="cpu"):
    student, teacher = torch.randn(6, columns).to(device, dtype), torch.randn(6, columns).to(device, dtype)
    probs = torch.rand(6, columns, device=device).softmax(1)
    student[:, 7] = -math.inf
    teacher[:, 7] = -math.inf
    probs[:, 7] = 0.0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    labels = Targets(None, probs.to(dtype), smoothing)
    check(op, student, teacher, coefficients(6, wide, tau).to(device), labels, Divergence("forward_kl"))


def strided_rows_are_read_where_they_lie(op, columns, device="cpu"):
    storage, teacher = torch.randn(3, 5, columns, device=device), torch.randn(3, 4, columns, device=device)
    coef = torch.ones(5, 12, device=device)
    coef[3:] = 0.0
    view = storage[:, 1:, :]
    arguments = ops.DenseTeacher(teacher, Divergence("forward_kl")).arguments(coef, Targets())
    for a, b in zip(op(view, *arguments), op(view.contiguous(), *arguments), strict=True):
        assert torch.equal(a, b)
