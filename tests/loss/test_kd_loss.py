"""What kd_loss promises about rows, weights, denominators, shapes and backward modes."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast import KDLoss, SoftLabels, kd_loss
from kdfast.testing import loss_and_gradient, relative_error

IGNORE = -100


def eager(student, teacher, labels=None, *, temperature=1.0, teacher_temperature=None, kd_weight=1.0, ce_weight=0.0):
    """Per-row loss, as one would write it."""
    tau_t = temperature if teacher_temperature is None else teacher_temperature
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / tau_t).log_softmax(-1)
    kd = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    if labels is None:
        return kd_weight * kd
    ce = F.cross_entropy(student.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return kd_weight * kd + ce_weight * ce.view(labels.shape)


def logits(*shape):
    return torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)


def assert_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def with_gradient(student, make_loss):
    leaf = student.detach().clone().requires_grad_()
    loss = make_loss(leaf)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("shape", [(5, 11), (2, 3, 11), (2, 3, 4, 11), (11,)])
def test_leading_dimensions(shape):
    student, teacher = logits(*shape)
    rows = math.prod(shape[:-1])
    ours = loss_and_gradient(student, teacher, temperature=2.0)
    assert_same(ours, with_gradient(student, lambda s: eager(s, teacher, temperature=2.0).sum() / rows))
    assert kd_loss(student, teacher, reduction="none").shape == shape[:-1]


def test_reductions_and_num_items():
    student, teacher = logits(6, 11)
    labels = torch.tensor([1, IGNORE, 3, 4, IGNORE, 0])
    per_row = eager(student, teacher, labels, temperature=2.0, ce_weight=0.5)
    counted = labels != IGNORE
    options = {"temperature": 2.0, "ce_weight": 0.5}
    expected = torch.where(counted, per_row, 0.0)
    assert torch.allclose(kd_loss(student, teacher, labels, **options, reduction="none"), expected)
    assert torch.allclose(kd_loss(student, teacher, labels, **options, reduction="sum"), expected.sum())
    assert torch.allclose(kd_loss(student, teacher, labels, **options), expected.sum() / 4)
    for items in (7, torch.tensor(7), torch.tensor(7.0)):
        assert torch.allclose(kd_loss(student, teacher, labels, **options, num_items=items), expected.sum() / 7)


def test_accumulated_micro_batches_are_one_batch():
    student, teacher = logits(6, 11)
    labels = torch.tensor([1, IGNORE, 3, 4, IGNORE, IGNORE])
    whole = loss_and_gradient(student, teacher, labels, ce_weight=1.0)
    halves = [
        loss_and_gradient(student[h], teacher[h], labels[h], ce_weight=1.0, num_items=3)
        for h in (slice(0, 3), slice(3, 6))
    ]
    assert_same(whole, (halves[0][0] + halves[1][0], torch.cat([halves[0][1], halves[1][1]])))


def test_row_weight_scales_the_loss_and_a_mask_also_counts():
    student, teacher = logits(4, 11)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    rows = eager(student, teacher)
    assert torch.allclose(kd_loss(student, teacher, row_weight=weight), (weight * rows).sum() / 4)
    mask = torch.tensor([True, False, True, False])
    assert torch.allclose(kd_loss(student, teacher, row_weight=mask), rows[mask].mean())


def test_per_row_options():
    student, teacher = logits(2, 3, 11)
    labels = torch.randint(0, 11, (2, 3))
    tau, kd, ce = (torch.rand(2, 3, dtype=torch.float64) + 0.5 for _ in range(3))
    ours = loss_and_gradient(student, teacher, labels, temperature=tau, kd_weight=kd, ce_weight=ce)

    def expected(s):
        log_q, log_p = (s / tau[..., None]).log_softmax(-1), (teacher / tau[..., None]).log_softmax(-1)
        kd_rows = tau**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        ce_rows = F.cross_entropy(s.flatten(0, 1), labels.flatten(), reduction="none").view(2, 3)
        return (kd * kd_rows + ce * ce_rows).mean()

    assert_same(ours, with_gradient(student, expected))
    # 0-d tensors are numbers that a schedule may change without recompiling.
    scalar = kd_loss(student, teacher, temperature=torch.tensor(2.0), kd_weight=torch.tensor(0.3))
    assert torch.allclose(scalar, kd_loss(student, teacher, temperature=2.0, kd_weight=0.3))


def test_teacher_temperature_and_t2():
    student, teacher = logits(4, 11)
    options = {"temperature": 2.0, "teacher_temperature": 3.0}
    expected = eager(student, teacher, **options).mean()
    assert torch.allclose(kd_loss(student, teacher, **options), expected)
    assert torch.allclose(kd_loss(student, teacher, **options, scale_by_t2=False), expected / 4)
    mse = kd_loss(student, teacher, divergence="logit_mse", temperature=2.0)
    assert torch.allclose(mse, (student - teacher).square().mean())


def test_z_loss():
    student, teacher = logits(4, 11)
    ours = loss_and_gradient(student, teacher, kd_weight=0.0, z_weight=0.3)
    assert_same(ours, with_gradient(student, lambda s: 0.3 * s.logsumexp(-1).square().mean()))


@pytest.mark.parametrize("mode", ["fused", "recompute", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_modes_agree(mode, dtype):
    student, teacher = torch.randn(7, 1500).to(dtype), torch.randn(7, 1500).to(dtype)
    labels = torch.tensor([3, IGNORE, 0, 1499, 5, 6, 1024])
    student[:, 100:200] = -math.inf
    teacher[:, 100:200] = -math.inf
    options = {"temperature": 2.0, "ce_weight": 0.5, "label_smoothing": 0.1, "divergence": "jsd"}
    for target in (teacher, SoftLabels.dense(teacher)):
        ours = loss_and_gradient(student, target, labels, **options, backward=mode)
        exact = loss_and_gradient(student.double(), teacher.double(), labels, **options)
        assert torch.allclose(ours[0].double(), exact[0], rtol=1e-5)
        assert (ours[1].double() - exact[1]).abs().max() <= exact[1].abs().max() * torch.finfo(dtype).eps


def test_upstream_gradients():
    student, teacher = torch.randn(5, 40), torch.randn(5, 40)
    plain = loss_and_gradient(student, teacher, temperature=2.0)[1]
    for mode in ("fused", "recompute", "inplace"):
        leaf = student.clone().requires_grad_()
        (kd_loss(leaf * 1.0, teacher, temperature=2.0, backward=mode) * 1024.0 / 3).backward()
        assert relative_error(leaf.grad, plain.double() * 1024.0 / 3) < 1e-6
    leaf = student.clone().requires_grad_()
    upstream = torch.rand(5)
    kd_loss(leaf, teacher, temperature=2.0, reduction="none").backward(upstream)
    assert relative_error(leaf.grad, 5 * upstream.double()[:, None] * plain) < 1e-6


def test_float16_gradients_survive_grad_scaler():
    """Computed after scaling: the unscaled gradient would underflow."""
    student, teacher = torch.randn(64, 20000).half() * 0.1, torch.randn(64, 20000).half() * 0.1
    leaf = student.clone().requires_grad_()
    (kd_loss(leaf, teacher) * 65536).backward()
    exact = loss_and_gradient(student.double(), teacher.double())[1] * 65536
    assert (leaf.grad.double() - exact).abs().max() < exact.abs().max() * 1e-3


def test_shift_compares_with_the_next_label():
    student, teacher = logits(3, 5, 11)
    labels = torch.randint(0, 11, (3, 5))
    labels[1, 3] = IGNORE
    options = {"temperature": 2.0, "ce_weight": 0.5}
    shifted = kd_loss(student, teacher, labels, **options, shift=True, reduction="none")
    sliced = kd_loss(student[:, :-1], teacher[:, :-1], labels[:, 1:], **options, reduction="none")
    assert shifted.shape == (3, 4)
    assert torch.equal(shifted, sliced)
    ours = loss_and_gradient(student, teacher, labels, **options, shift=True)
    expected = with_gradient(student, lambda s: kd_loss(s[:, :-1], teacher[:, :-1], labels[:, 1:], **options))
    assert_same(ours, expected)
    weight = torch.rand(3, 4, dtype=torch.float64)
    assert torch.equal(
        kd_loss(student, teacher, labels, **options, shift=True, row_weight=weight),
        kd_loss(student[:, :-1], teacher[:, :-1], labels[:, 1:], **options, row_weight=weight),
    )
    probs = torch.rand(3, 5, 11, dtype=torch.float64).softmax(-1)
    assert torch.allclose(
        kd_loss(student, teacher, probs, **options, shift=True),
        kd_loss(student[:, :-1], teacher[:, :-1], probs[:, 1:], **options),
    )


@pytest.mark.parametrize("columns", [(19, 23), (23, 19)])
def test_vocabularies_may_differ(columns):
    """The divergence is over the shared columns, cross-entropy over all of the student's."""
    student, teacher = torch.randn(4, columns[0]).double(), torch.randn(4, columns[1]).double()
    labels = torch.tensor([0, 5, 18, columns[0] - 1])
    ours = loss_and_gradient(student, teacher, labels, temperature=2.0, ce_weight=0.5, vocab="shared")

    def expected(s):
        return eager(s[:, :19], teacher[:, :19], temperature=2.0).mean() + 0.5 * F.cross_entropy(s, labels)

    assert_same(ours, with_gradient(student, expected))


def test_nothing_counted_is_zero_with_a_graph():
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    student[1] = math.nan
    for mode in ("fused", "recompute", "inplace"):
        loss, grad = loss_and_gradient(student, teacher, torch.full((3,), IGNORE), ce_weight=1.0, backward=mode)
        assert loss == 0.0
        # Through `leaf * 1.0`: zeros, although a logit is NaN.
        assert (grad == 0.0).all()


@pytest.mark.parametrize("labels", [False, True])
def test_no_rows(labels):
    student, teacher = torch.randn(0, 7, requires_grad=True), torch.randn(0, 7)
    teacher = SoftLabels.dense(teacher) if labels else teacher
    loss = kd_loss(student, teacher)
    assert loss == 0.0
    loss.backward()
    assert student.grad.shape == (0, 7)
    assert kd_loss(student, teacher, reduction="none").shape == (0,)


def test_non_contiguous_inputs():
    student, teacher = torch.randn(11, 6).double().t(), torch.randn(6, 22).double()[:, ::2]
    ours = loss_and_gradient(student, teacher)
    assert_same(ours, loss_and_gradient(student.contiguous(), teacher.contiguous()))


def test_no_gradient_is_computed_without_need():
    student, teacher = torch.randn(4, 1000), torch.randn(4, 1000)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        kd_loss(student.requires_grad_(), teacher)
    assert max(event.cpu_memory_usage for event in profile.events()) < student.numel() * 4


@pytest.mark.parametrize("mode", ["fused", "recompute", "inplace"])
def test_peak_memory_is_the_gradient_and_rows(mode):
    # Below the size from which gradients come from a block of their own, which the profiler would not see.
    student, teacher = torch.randn(64, 30000), torch.randn(64, 30000)
    leaf = student.requires_grad_()
    hidden = leaf * 1.0
    with torch.profiler.profile(profile_memory=True) as profile:
        kd_loss(hidden, teacher, temperature=2.0, backward=mode).backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    # `leaf * 1.0` has a gradient of its own to compute and to keep: one more than the loss's.
    gradients = 1 if mode == "inplace" else 2
    assert allocated <= (gradients + 0.1) * student.numel() * 4


def test_parts():
    student, teacher = logits(5, 11)
    labels = torch.tensor([1, IGNORE, 3, 4, 0])
    options = {"temperature": 2.0, "ce_weight": 0.5, "return_parts": True}
    loss, parts = kd_loss(student, teacher, labels, **options, reduction="none")
    rows = labels != IGNORE
    q = (student / 2).softmax(-1)
    assert torch.allclose(parts.kd[rows], eager(student, teacher, temperature=2.0)[rows] / 4)
    assert torch.allclose(parts.ce[rows], F.cross_entropy(student, labels, reduction="none")[rows])
    assert torch.allclose(parts.entropy[rows], -(q * q.log()).sum(-1)[rows])
    assert torch.equal(parts.top1[rows] == 1.0, (student.argmax(-1) == teacher.argmax(-1))[rows])
    assert torch.allclose(loss, torch.where(rows, 4 * parts.kd + 0.5 * parts.ce, 0.0))
    _, means = kd_loss(student.requires_grad_(), teacher, labels, **options)
    assert torch.allclose(means.kd, parts.kd[rows].mean())
    assert not means.kd.requires_grad


def test_parts_of_terms_that_weigh_nothing():
    student, teacher = logits(5, 11)
    labels = torch.randint(0, 11, (5,))
    _, parts = kd_loss(student, teacher, labels, kd_weight=0.0, ce_weight=1.0, return_parts=True)
    assert torch.allclose(parts.kd, eager(student, teacher).mean())


def test_module_binds_options():
    student, teacher = logits(5, 11)
    module = KDLoss(temperature=2.0, divergence="reverse_kl")
    assert torch.equal(module(student, teacher), kd_loss(student, teacher, temperature=2.0, divergence="reverse_kl"))
    assert torch.equal(module(student, teacher, temperature=1.0), kd_loss(student, teacher, divergence="reverse_kl"))
    assert "temperature=2.0" in repr(module)


def test_normalised_jsd_is_continuous():
    student, teacher = logits(5, 11)
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        limit = loss_and_gradient(student, teacher, divergence=name)
        near = loss_and_gradient(student, teacher, divergence=kdfast.jsd(abs(beta - 1e-7), normalize=True))
        at = loss_and_gradient(student, teacher, divergence=kdfast.jsd(beta, normalize=True))
        assert_same(at, limit)
        assert torch.allclose(near[1], limit[1], rtol=1e-4, atol=1e-8)


def test_more_rows_than_a_16_bit_grid():
    student, teacher = torch.randn(70000, 3), torch.randn(70000, 3)
    assert torch.allclose(kd_loss(student, teacher), eager(student, teacher).mean(), rtol=1e-4)


def test_same_numbers_on_any_number_of_threads():
    student, teacher = torch.randn(64, 3000), torch.randn(64, 3000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(loss_and_gradient(student, teacher, temperature=2.0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][1], results[1][1])


def test_labels_and_soft_labels_may_be_strided():
    student, teacher = torch.randn(6, 50), torch.randn(6, 50)
    pairs = torch.randint(0, 50, (6, 2))
    for labels in (pairs[:, 0], torch.tensor([7]).expand(6)):
        for options in ({"kd_weight": 0.0, "ce_weight": 1.0}, {"divergence": "dkd"}):
            strided = kd_loss(student, teacher, labels, **options)
            assert torch.equal(strided, kd_loss(student, teacher, labels.contiguous(), **options))
    ids, weights = torch.stack([torch.randperm(50)[:8] for _ in range(6)]), torch.rand(6, 8)
    strided = SoftLabels.weights(ids[:, ::2], weights[:, ::2], vocab_size=50)
    flat = SoftLabels.weights(
        ids.flatten()[::2], weights.flatten()[::2], vocab_size=50, offsets=(torch.arange(14) * 4)[:7]
    )
    for labels in (strided, flat):
        assert torch.allclose(
            kd_loss(student, labels, divergence="soft_ce"),
            -(weights[:, ::2] * student.log_softmax(1).gather(1, ids[:, ::2])).sum(1).mean(),
        )
    across = SoftLabels.dense(teacher.t().contiguous().t())
    assert torch.equal(kd_loss(student, across), kd_loss(student, teacher))


def test_uncounted_rows_survive_an_infinite_upstream():
    student, teacher = torch.randn(2, 7, requires_grad=True), torch.randn(2, 7)
    kd_loss(student, teacher, torch.tensor([IGNORE, 1]), reduction="none").sqrt().sum().backward()
    assert (student.grad[0] == 0.0).all()
    assert student.grad[1].isfinite().all()


def test_soft_label_corners():
    student = torch.randn(3, 9)
    empty = SoftLabels.topk(torch.zeros(3, 0).long(), torch.zeros(3, 0), torch.zeros(3), vocab_size=9)
    assert torch.equal(kd_loss(student, empty), torch.zeros(()))
    # All of the mass in the tail, and rounding above it.
    above = SoftLabels.topk(torch.zeros(3, 1).long(), torch.full((3, 1), -30.0), torch.full((3,), 1e-8), vocab_size=9)
    assert kd_loss(student, above).isfinite()


def test_a_freed_gradient_makes_room_for_the_next():
    """From torch 2.11 on; a gradient that somebody still holds is nobody else's."""
    student, teacher = torch.randn(300, 9000), torch.randn(300, 9000)

    def gradient():
        return loss_and_gradient(student, teacher, temperature=2.0)[1]

    first, second = gradient(), gradient()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    expected = first.clone()
    first.fill_(7.0)
    assert torch.equal(second, expected)
    del first, second
    with ThreadPoolExecutor(4) as pool:
        for grad in pool.map(lambda _: gradient(), range(12)):
            assert torch.equal(grad, expected)
