"""Heads: the loss and gradients of the logits that they stand for, whatever the chunks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kdfast import Head, SoftLabels, kd_loss
from kdfast.loss import head_loss, workspace
from support import teachers

ROWS, VOCAB, WIDTH = 24, 97, 16


@pytest.fixture(autouse=True, params=["1 chunk", "7 chunks"])
def _chunks(request, monkeypatch):
    rows = ROWS if request.param == "1 chunk" else 4
    monkeypatch.setenv("KDFAST_WORKSPACE", str(rows * VOCAB * 40))


def make_student(dtype=torch.float64, bias=True, **options):
    hidden, weight = torch.randn(ROWS, WIDTH, dtype=dtype), torch.randn(VOCAB, WIDTH, dtype=dtype)
    leaves = [hidden, weight, *([torch.randn(VOCAB, dtype=dtype)] if bias else [])]
    return [x.requires_grad_() for x in leaves], options


def logits_of(hidden, weight, bias=None, scale=1.0, softcap=None):
    x = scale * torch.nn.functional.linear(hidden, weight, bias)
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def make_teacher(kind, dtype=torch.float64):
    """(as a head's loss takes it, as the loss of logits does)."""
    states, layer = torch.randn(ROWS, 8, dtype=dtype), torch.randn(VOCAB, 8, dtype=dtype)
    given = teachers.make_teacher(kind, states, layer)
    return given, states @ layer.T if kind == "head" else given


def check(leaves, options, given, expected, labels=None, tolerance=1e-9, **arguments):
    """Value and gradients, both ways."""
    loss = kd_loss(Head(*leaves, **options), given, labels, **arguments)
    eager = kd_loss(logits_of(*leaves, **options), expected, labels, **arguments)
    assert torch.allclose(loss, eager, rtol=tolerance, atol=tolerance)
    upstream = torch.rand_like(loss)
    ours = torch.autograd.grad(loss, leaves, upstream)
    for name, a, b in zip(
        ("hidden", "weight", "bias"), ours, torch.autograd.grad(eager, leaves, upstream), strict=False
    ):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max())), name


@pytest.mark.parametrize("kind", teachers.TEACHERS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce", "jsd"])
def test_every_teacher(kind, reduction, divergence):
    if (divergence != "soft_ce" and kind == "weights") or (divergence == "jsd" and kind == "topk"):
        return  # whose labels do not say enough
    leaves, options = make_student()
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[3:9] = -100
    arguments = {"divergence": divergence, "ce_weight": 0.5, "reduction": reduction, "label_smoothing": 0.1}
    tolerance = 1e-6 if kind == "hidden" else 1e-9  # whose logits are float32
    check(leaves, options, *make_teacher(kind), labels, tolerance, **arguments)


@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_layer(options, bias, dtype):
    leaves, options = make_student(dtype, bias, **options)
    labels = torch.randint(0, VOCAB, (ROWS,))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    teachers = make_teacher("head", dtype)
    check(leaves, options, *teachers, labels, tolerance, temperature=2.0, ce_weight=1.0, z_weight=1e-2)
    check(leaves, options, *teachers, labels, tolerance, backward="recompute", reduction="sum")


@pytest.mark.parametrize("kind", ["logits", "head", "topk", "prototype"])
def test_rows_in_several_dimensions(kind):
    (hidden, weight, bias), _ = make_student()
    hidden = hidden.detach().view(2, 3, 4, WIDTH).requires_grad_()
    given, expected = make_teacher(kind)
    if kind == "logits":
        given = expected = expected.view(2, 3, 4, VOCAB)
    if kind == "head":
        given, expected = Head(given.hidden.view(2, 3, 4, 8), given.weight), expected.view(2, 3, 4, VOCAB)
    labels = torch.randint(0, VOCAB, (2, 3, 4))
    arguments = {
        "shift": True,
        "ce_weight": 1.0,
        "temperature": torch.rand(2, 3, 4) + 1,
        "row_weight": torch.rand(2, 3, 4),
    }
    if kind in ("topk", "prototype"):
        del arguments["temperature"]
    for reduction in ("mean", "none"):
        check([hidden, weight, bias], {}, given, expected, labels, reduction=reduction, **arguments)


@pytest.mark.parametrize("backward", ["fused", "recompute", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_teachers_head_alone(backward, dtype):
    given, expected = make_teacher("head", dtype)
    student = torch.randn(ROWS, VOCAB, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[2] = -100
    ours, eager = (kd_loss(student * 1, x, labels, ce_weight=1.0, backward=backward) for x in (given, expected))
    assert torch.allclose(ours, eager)
    assert torch.allclose(*(torch.autograd.grad(3.0 * x, student)[0] for x in (ours, eager)), atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"backward": "recompute"}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_logits_that_lie_the_other_way(dtype, options):
    """Of a student whose teacher has a head, and of a teacher, as a tensor or as labels, whose student has one."""
    hidden, weight, logits = (torch.randn(n, d).to(dtype) for n, d in ((5, 8), (20, 8), (5, 20)))
    transposed = logits.t().contiguous().t()
    assert not transposed.is_contiguous()

    def run(student, teacher, leaf):
        leaf.requires_grad_()
        loss = kd_loss(student, teacher, **options)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        with torch.no_grad():
            assert torch.equal(kd_loss(student, teacher, **options), loss)
        return loss.detach(), grad

    def both(x):
        # The gradient is asked of a leaf that lies as x does.
        student, of_hidden = x.detach(), hidden.clone()
        yield from run(student, Head(hidden, weight), student)
        for teacher in (x.detach(), SoftLabels.dense(x.detach())):
            yield from run(Head(of_hidden, weight), teacher, of_hidden)

    assert all(torch.equal(a, b) for a, b in zip(both(logits), both(transposed), strict=True))


def test_class_probabilities_and_parts():
    leaves, options = make_student()
    probs = torch.rand(ROWS, VOCAB, dtype=torch.float64).softmax(-1)
    given, expected = make_teacher("head")
    check(leaves, options, given, expected, probs, ce_weight=1.0)
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[:4] = -100
    for reduction in ("mean", "none"):
        results = [
            kd_loss(x, y, labels, ce_weight=1.0, reduction=reduction, return_parts=True)
            for x, y in ((Head(*leaves), given), (logits_of(*leaves), expected))
        ]
        for a, b in zip(results[0][1], results[1][1], strict=True):
            assert torch.allclose(a, b)


def test_narrow_hidden_states_keep_wide_logits():
    """Near the teacher the gradient is a small difference, which logits rounded to bfloat16 do not have."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(ROWS, 64).bfloat16(), (torch.randn(VOCAB, 64) * 10 / 8).bfloat16()
    teacher = logits_of(hidden.double(), weight.double()) + 0.05 * torch.randn(ROWS, VOCAB, dtype=torch.float64)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(kd_loss(logits_of(*exact), teacher), exact)
    errors = {}
    for dtype in (None, torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        found = torch.autograd.grad(kd_loss(Head(*leaves, logits_dtype=dtype), teacher.float()), leaves)
        errors[dtype] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    assert errors[None] < 5e-3
    assert errors[torch.bfloat16] > 20 * errors[None]


def test_what_is_frozen_has_no_gradient():
    given, _ = make_teacher("head")
    for frozen in range(3):
        leaves, _ = make_student()
        leaves[frozen].requires_grad_(False)
        kd_loss(Head(*leaves), given).backward()
        assert [x.grad is None for x in leaves] == [i == frozen for i in range(3)]
    with torch.no_grad():
        assert not kd_loss(Head(*make_student()[0]), given).requires_grad


def test_tied_weights_add_up():
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    tokens, (given, expected) = torch.randint(0, VOCAB, (ROWS,)), make_teacher("head")
    losses = [kd_loss(Head(weight[tokens], weight), given), kd_loss(weight[tokens] @ weight.T, expected)]
    assert torch.allclose(*(torch.autograd.grad(loss, weight)[0] for loss in losses))


def test_the_callers_own_gradient_is_added_to():
    (hidden, weight), _ = make_student(torch.float32, bias=False)
    given, _ = make_teacher("topk")
    kd_loss(Head(hidden, weight), given).backward()
    grad = torch.ones_like(weight).detach()
    for _ in range(2):
        kd_loss(Head(hidden, weight, weight_grad=grad), given, reduction="mean").backward()
    assert torch.allclose(grad, 1 + 2 * weight.grad, atol=1e-6)
    (2 * kd_loss(Head(hidden, weight, weight_grad=grad), given)).backward()
    assert torch.allclose(grad, 1 + 4 * weight.grad, atol=1e-6)


def test_the_callers_own_gradient_is_added_to_by_backward_passes_alone():
    (hidden, weight), _ = make_student(torch.float32, bias=False)
    given, _ = make_teacher("topk")
    kd_loss(Head(hidden, weight), given).backward()
    grad = torch.zeros_like(weight).detach()
    with torch.no_grad():
        kd_loss(Head(hidden, weight, weight_grad=grad), given)
    kd_loss(Head(hidden, weight, weight_grad=grad), given)  # nobody differentiates it
    assert not grad.any()
    for reentrant in (True, False):
        grad.zero_()
        checkpoint(
            lambda x: kd_loss(Head(x, weight, weight_grad=grad), given), hidden, use_reentrant=reentrant
        ).backward()
        assert torch.allclose(grad, weight.grad, atol=1e-6)


@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_without_grad_mode_only_the_loss_is_computed(backward, monkeypatch):
    (hidden, weight, bias), _ = make_student(torch.float32)
    given, _ = make_teacher("head", torch.float32)
    expected = kd_loss(Head(hidden, weight, bias), given, backward=backward)
    passes = []
    for name in ("_gradients", "_gradient_of_logits"):
        monkeypatch.setattr(head_loss, name, lambda *a, **b: passes.append(a))
    with torch.no_grad():
        assert torch.equal(kd_loss(Head(hidden, weight, bias), given, backward=backward), expected)
        kd_loss(logits_of(hidden, weight, bias), given, backward=backward)
    for reduction in ("mean", "none"):
        frozen = Head(*(x.detach() for x in (hidden, weight, bias)))
        assert not kd_loss(frozen, given, backward=backward, reduction=reduction).requires_grad
    assert not passes
    # The first pass of such a checkpoint runs without grad mode; its second one is differentiated.
    loss = checkpoint(lambda x: kd_loss(Head(x, weight, bias), given, backward=backward), hidden, use_reentrant=True)
    assert torch.equal(loss, expected)
    assert not passes


def test_a_gradient_is_used_once():
    leaves, _ = make_student(torch.float32)
    loss = kd_loss(Head(*leaves), make_teacher("topk")[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="recompute"):
        loss.backward()


def test_bad_heads_are_refused():
    hidden, weight = torch.randn(2, 4), torch.randn(5, 4)
    for error, arguments, options in [
        (ValueError, (hidden[:, :3], weight), {}),
        (ValueError, (hidden, weight, weight[:4, 0]), {}),
        (TypeError, (hidden.bfloat16(), weight), {}),
        (TypeError, (hidden, weight), {"logits_dtype": torch.bfloat16}),
        (ValueError, (hidden, weight), {"weight_grad": weight[:4]}),
        (ValueError, (hidden, weight), {"softcap": -1.0}),
    ]:
        with pytest.raises(error):
            Head(*arguments, **options)
    with pytest.raises(ValueError, match="inplace"):
        kd_loss(Head(hidden, weight), torch.randn(2, 5), backward="inplace")
    with pytest.raises(ValueError, match="leading dimensions"):
        kd_loss(Head(hidden, weight), torch.randn(3, 5))
    with pytest.raises(ValueError, match="requires grad"):
        kd_loss(Head(hidden, weight), Head(hidden.requires_grad_(), weight))


@pytest.mark.parametrize("size", ["0", "many", "-1", "1.5GiB"])
def test_bad_workspaces_are_refused(size, monkeypatch):
    monkeypatch.setenv("KDFAST_WORKSPACE", size)
    with pytest.raises(ValueError, match="KDFAST_WORKSPACE"):
        kd_loss(Head(torch.randn(2, 4), torch.randn(5, 4)), torch.randn(2, 5))


def test_no_rows():
    leaves = [torch.randn(0, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH, requires_grad=True)]
    loss = kd_loss(Head(*leaves), torch.randn(0, VOCAB))
    loss.backward()
    assert loss.item() == 0.0
    assert not leaves[1].grad.any()


def test_autocast():
    hidden, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH, requires_grad=True)
    given, _ = make_teacher("topk")
    with torch.autocast("cpu", torch.bfloat16):
        loss = kd_loss(Head(hidden.bfloat16(), weight), given)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [x.dtype for x in grads] == [torch.float32] * 2
    eager = kd_loss(hidden @ weight.T, given)
    assert torch.allclose(loss, eager, rtol=2e-2)


def test_memory_is_used_again_and_bounded(monkeypatch):
    monkeypatch.setattr(workspace, "_POOL", workspace._Pool())
    hidden, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH)
    teacher = torch.randn(ROWS, VOCAB)
    kd_loss(Head(hidden, weight), teacher)
    (block,) = workspace._POOL._kept
    kd_loss(Head(hidden, weight), teacher)
    assert workspace._POOL._kept[0] is block
    monkeypatch.setenv("KDFAST_WORKSPACE", str(block.numel() - 1))
    kd_loss(Head(hidden, weight), teacher)
    assert sum(kept.numel() for kept in workspace._POOL._kept) < block.numel()
    workspace.release()
    assert not workspace._POOL._kept


def test_losses_of_several_threads():
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH)
    inputs = [(torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, VOCAB)) for _ in range(16)]

    def gradient(pair):
        hidden, teacher = pair
        return torch.autograd.grad(kd_loss(Head(hidden, weight), teacher), hidden)[0]

    alone = list(map(gradient, inputs))
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(pool.map(gradient, inputs), alone, strict=True):
            assert torch.equal(a, b)
