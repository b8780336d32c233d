"""Derivatives beyond the first gradient: an error that always comes, and ``backward="eager"``, which has them all."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from kdfast import Head, KDLoss, SoftLabels, kd_loss
from kdfast.divergences import Divergence
from kdfast.loss import ops
from kdfast.loss.reference import Targets
from kdfast.objectives import pkt

# PyTorch's own: what forward mode and torch.compile import uses what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROWS, VOCAB, WIDTH = 3, 7, 4
WIDE = torch.float64
ONCE = r'once differentiable.*backward="eager"'


def truth(student, teacher, temperature=2.0):
    """``kd_loss`` at that temperature, in plain PyTorch."""
    s, t = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * F.kl_div(s, t, log_target=True, reduction="sum") / len(student)


def eager(student, teacher, **options):
    return kd_loss(student, teacher, temperature=2.0, backward="eager", **options)


def plain(student, teacher):
    return kd_loss(student, teacher, temperature=2.0)


def randn(*shape, dtype=WIDE):
    return torch.randn(*shape, dtype=dtype)


def labels_of(kind):
    ids = torch.tensor([[0, 5], [3, 1], [2, 4]])
    if kind == "topk":
        return SoftLabels.topk(ids, torch.full((3, 2), -1.5), torch.full((3,), -0.6), vocab_size=VOCAB)
    if kind == "weights":
        return SoftLabels.weights(ids, torch.rand(3, 2), vocab_size=VOCAB)
    if kind == "dense":
        return SoftLabels.dense(randn(ROWS, VOCAB, dtype=torch.float32))
    return SoftLabels.prototype(
        ids,
        torch.full((3, 2), 0.2),
        torch.full((3,), 0.6).log(),
        torch.tensor([0, 1, 0]),
        torch.rand(2, VOCAB),
        vocab_size=VOCAB,
    )


def teachers(kind, dtype):
    if kind == "logits":
        return randn(ROWS, VOCAB, dtype=dtype)
    return Head(randn(ROWS, 5, dtype=dtype), randn(VOCAB, 5, dtype=dtype)) if kind == "head" else labels_of(kind)


# ---- the error ------------------------------------------------------------------------------------------------------


def assert_once(loss, inputs):
    """No derivative of the gradients of ``loss`` comes out, whatever it is taken with respect to."""
    upstream = torch.rand_like(loss).requires_grad_()
    grads = torch.autograd.grad((loss * upstream).sum(), inputs, create_graph=True)
    for gradient in grads:
        for x in (*inputs, upstream):
            with pytest.raises(NotImplementedError, match=ONCE):
                torch.autograd.grad(gradient.sum(), x, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("teacher", ["logits", "head", "topk", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, WIDE], ids=str)
@pytest.mark.parametrize("backward", ["fused", "recompute", "inplace"])
def test_the_derivative_of_a_gradient_is_an_error(backward, dtype, teacher):
    given = teachers(teacher, dtype)
    for reduction in ("mean", "none"):
        if backward == "inplace" and (reduction == "none" or dtype == torch.float16):
            continue
        leaf = randn(ROWS, VOCAB, dtype=dtype).requires_grad_()
        assert_once(kd_loss(leaf * 1.0, given, backward=backward, reduction=reduction), [leaf])
        if backward != "inplace":
            leaves = [x.requires_grad_() for x in (randn(ROWS, WIDTH, dtype=dtype), randn(VOCAB, WIDTH, dtype=dtype))]
            assert_once(kd_loss(Head(*leaves), given, backward=backward, reduction=reduction), leaves)


@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_hessians_and_their_products_are_errors(backward):
    z, t, v = (randn(ROWS, VOCAB, dtype=torch.float32) for _ in range(3))

    def loss(z):
        return kd_loss(z, t, backward=backward)

    for call in (
        lambda: hessian(loss, z),
        lambda: hessian(loss, z, vectorize=True),
        lambda: hvp(loss, z, v),
        lambda: torch.autograd.functional.jvp(loss, z, v),  # which is a derivative of a gradient
    ):
        with pytest.raises(NotImplementedError, match=ONCE):
            call()


@pytest.mark.parametrize("backward", ["fused", "recompute", "eager"])
def test_a_gradient_penalty_and_an_inner_step(backward):
    """Through a student of two layers: right, or an error."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, VOCAB)).to(WIDE)
    weights, x, t = dict(net.named_parameters()), randn(ROWS, 5), randn(ROWS, VOCAB)

    def penalty(loss):
        grads = torch.autograd.grad(loss(net(x), t), list(weights.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(weights.values()), allow_unused=True)

    def inner_step(loss):
        grads = torch.autograd.grad(loss(net(x), t), list(weights.values()), create_graph=True)
        moved = {name: w - 0.5 * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        return torch.autograd.grad(loss(functional_call(net, moved, x), t), list(weights.values()))

    for run in (penalty, inner_step):

        def loss(s, t):
            return kd_loss(s, t, temperature=2.0, backward=backward)

        if backward == "eager":
            for a, b in zip(run(loss), run(truth), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        else:
            with pytest.raises(NotImplementedError, match=ONCE):
                run(loss)


def test_a_graph_of_gradients_is_freed_with_them():
    leaf, t = randn(ROWS, VOCAB, dtype=torch.float32).requires_grad_(), randn(ROWS, VOCAB, dtype=torch.float32)
    (made,) = torch.autograd.grad(kd_loss(leaf, t), leaf, create_graph=True)
    assert torch.equal(made, torch.autograd.grad(kd_loss(leaf, t), leaf)[0])
    node = weakref.ref(made)
    del made
    assert node() is None


@pytest.mark.parametrize("form", ["losses", "grad", "inplace"])
@pytest.mark.parametrize("kind", ["logits", "topk"])
def test_the_ops_refuse_tangents(kind, form):
    student, coef = randn(1, ROWS, VOCAB, dtype=torch.float32), torch.rand(5, ROWS)
    if kind == "logits":
        teacher = ops.DenseTeacher(torch.randn(1, ROWS, VOCAB), Divergence("forward_kl"))
    else:
        teacher = ops.SparseTeacher.of_labels(labels_of("topk"), Divergence("forward_kl"), 1.0, torch.float32)
    arguments = teacher.arguments(coef, Targets())
    op = getattr(teacher.ops, form)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student, torch.randn_like(student))
        with pytest.raises(NotImplementedError, match=r'forward mode.*backward="eager"'):
            op(dual, *arguments)
        with pytest.raises(NotImplementedError, match="forward mode"):
            op(student, *arguments._replace(coef=forward_ad.make_dual(coef, torch.ones_like(coef))))
        op(student.clone(), *arguments)
    if form == "inplace":
        with pytest.raises(NotImplementedError, match="has no derivative"):
            op(student.requires_grad_() * 1.0, *arguments)


# ---- backward="eager" -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "div",
    [
        *map(Divergence, ("forward_kl", "reverse_kl", "jsd", "tvd", "dkd", "logit_mse", "alpha_beta")),
        Divergence("soft_ce", standardize=True),
    ],
    ids=str,
)
def test_its_gradient_is_the_others(div):
    student, teacher, labels = randn(ROWS, VOCAB), randn(ROWS, VOCAB), torch.tensor([1, -100, 3])
    student[1], student[0, 2], teacher[0, 2] = torch.nan, -torch.inf, -torch.inf

    def loss(s, t, y, **more):
        return kd_loss(
            s, t, y, divergence=div, temperature=2.0, ce_weight=0.3, z_weight=0.1, label_smoothing=0.1, **more
        )

    for reduction in ("mean", "none"):
        values = []
        for backward in ("recompute", "eager"):
            leaf = student.clone().requires_grad_()
            value = loss(leaf, teacher, labels, backward=backward, reduction=reduction)
            value.sum().backward()
            values.append((value.detach(), leaf.grad))
        for a, b in zip(*values, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert hessian(lambda z: loss(z, teacher, labels, backward="eager"), student).isfinite().all()
    # Per sample, with labels and masked columns of its own.
    each = vmap(grad(loss))(student.expand(2, -1, -1), teacher.expand(2, -1, -1), labels.expand(2, -1))
    torch.testing.assert_close(each[1] * 2, values[1][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["topk", "weights", "prototype", "dense"])
def test_soft_labels(kind):
    teacher, labels, student = labels_of(kind), torch.tensor([1, -100, 3]), randn(ROWS, VOCAB)
    student[1] = torch.nan

    def loss(z, backward="eager"):
        divergence = "soft_ce" if kind == "weights" else "forward_kl"
        return kd_loss(z, teacher, labels, divergence=divergence, ce_weight=0.5, backward=backward)

    expected = grad_of(lambda z: loss(z, "recompute"), student)
    torch.testing.assert_close(grad_of(loss, student), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(vmap(grad(loss))(student[None])[0], expected, rtol=1e-9, atol=1e-12)
    # Finite differences of the gradient.
    v, step = torch.where(student.isnan(), 0.0, randn(ROWS, VOCAB)), 1e-5
    ahead, back = (grad_of(lambda z: loss(z, "recompute"), student + sign * step * v) for sign in (1, -1))
    found = hvp(loss, student, v)[1]
    torch.testing.assert_close(found, (ahead - back) / (2 * step), rtol=1e-5, atol=1e-7)


def grad_of(loss, z):
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("teacher", ["logits", "head"])
def test_heads(teacher):
    inputs = randn(ROWS, WIDTH), randn(VOCAB, WIDTH), randn(VOCAB)
    given = teachers(teacher, WIDE)
    logits = given.hidden @ given.weight.T if teacher == "head" else given

    def ours(*inputs):
        return eager(Head(*inputs, scale=0.5, softcap=3.0), given)

    def expected(hidden, weight, bias):
        return truth(3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0), logits)

    for a, b in zip(grad(ours, (0, 1, 2))(*inputs), grad(expected, (0, 1, 2))(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(hessian(ours, inputs), hessian(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    narrow = [x.bfloat16().requires_grad_() for x in inputs[:2]]
    if teacher == "head":
        given = Head(given.hidden, given.weight.requires_grad_())  # which is not trained
    values = [kd_loss(Head(*narrow), given, backward=mode) for mode in ("recompute", "eager")]
    torch.testing.assert_close(*values)
    for a, b in zip(*(torch.autograd.grad(value, narrow) for value in values), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-2 * float(b.abs().max()))


def test_several_dimensions_shift_and_parts():
    student, teacher, labels = randn(2, 4, VOCAB), randn(2, 4, VOCAB), torch.randint(0, VOCAB, (2, 4))
    options = {"shift": True, "ce_weight": 0.5, "temperature": torch.rand(2, 4) + 1, "return_parts": True}
    for reduction in ("mean", "none"):
        ours, fused = (
            kd_loss(student, teacher, labels, reduction=reduction, backward=mode, **options)
            for mode in ("eager", "fused")
        )
        for a, b in zip((ours[0], *ours[1]), (fused[0], *fused[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_autocast(dtype):
    student, teacher = randn(ROWS, VOCAB, dtype=dtype), randn(ROWS, VOCAB, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, fused = (
            grad_of(lambda z, mode=mode: kd_loss(z, teacher, temperature=2.0, backward=mode), student)
            for mode in ("eager", "recompute")
        )
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, fused)


def test_an_objective_takes_it():
    x, y = randn(4, 3), randn(4, 5)
    with pytest.raises(NotImplementedError, match=ONCE):
        hessian(lambda x: pkt(x, y), x)
    assert torch.autograd.gradgradcheck(lambda x: pkt(x, y, backward="eager"), x.requires_grad_())
    loss = KDLoss(temperature=2.0, backward="eager")
    for same in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(same(x, x.detach() + 1.0), loss(x, x.detach() + 1.0))


# ---- transforms of torch.func, and forward mode ---------------------------------------------------------------------


def test_transforms():
    z, t, v = (randn(ROWS, VOCAB) for _ in range(3))
    expected = grad(truth)(z, t)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(grad(plain)(z, t), expected, **close)
    torch.testing.assert_close(jacfwd(plain)(z, t), expected, **close)
    torch.testing.assert_close(jacrev(plain)(z, t), expected, **close)
    torch.testing.assert_close(
        vjp(lambda z: plain(z, t), z)[1](torch.tensor(3.0, dtype=WIDE))[0], 3 * expected, **close
    )
    torch.testing.assert_close(jvp(plain, (z, t), (v, 0 * v)), jvp(truth, (z, t), (v, 0 * v)), **close)
    torch.testing.assert_close(jvp(plain, (z, t), (v, v)), jvp(truth, (z, t), (v, v)), **close)
    torch.testing.assert_close(torch.func.hessian(plain)(z, t), hessian(lambda z: truth(z, t), z), **close)
    torch.testing.assert_close(
        vmap(plain)(z, t), torch.stack([truth(*x) for x in zip(z[:, None], t[:, None], strict=True)]), **close
    )
    torch.testing.assert_close(vmap(grad(plain))(z, t), ROWS * expected, **close)
    head = Head(randn(ROWS, WIDTH), randn(VOCAB, WIDTH))
    torch.testing.assert_close(
        jvp(lambda h: plain(Head(h, head.weight), t), (head.hidden,), (head.hidden,)),
        jvp(lambda h: truth(h @ head.weight.T, t), (head.hidden,), (head.hidden,)),
        **close,
    )


def test_dual_numbers():
    z, t, v = (randn(ROWS, VOCAB) for _ in range(3))
    expected = jvp(lambda z: truth(z, t), (z,), (v,))[1]
    for student in (z, z.clone().requires_grad_()):
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(plain(forward_ad.make_dual(student, v), t)).tangent
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            assert forward_ad.unpack_dual(plain(student, t)).tangent is None


def test_many_upstream_gradients_at_once():
    t = randn(ROWS, VOCAB, dtype=torch.float32)
    factors = torch.tensor([1.0, 2.0, 0.0])
    for student in (lambda z: z, lambda z: Head(z, torch.eye(VOCAB))):
        leaf = randn(ROWS, VOCAB, dtype=torch.float32).requires_grad_()
        loss = kd_loss(student(leaf), t)
        (grads,) = torch.autograd.grad(loss, leaf, factors, is_grads_batched=True, retain_graph=True)
        (one,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.testing.assert_close(grads, factors[:, None, None] * one)
        with pytest.raises(RuntimeError, match='backward="recompute"'):
            torch.autograd.grad(loss, leaf, factors, is_grads_batched=True)
    loss = kd_loss(Head(leaf, torch.eye(VOCAB)), t, backward="recompute")
    with pytest.raises(NotImplementedError, match="is_grads_batched"):
        torch.autograd.grad(loss, leaf, factors, is_grads_batched=True)


def test_what_it_does_not_serve_is_refused(tmp_path):
    z, t, weight = randn(ROWS, VOCAB), randn(ROWS, VOCAB), randn(VOCAB, VOCAB)
    with pytest.raises(ValueError, match=r'backward="eager".*weight_grad'):
        eager(Head(z, weight, weight_grad=torch.zeros_like(weight)), t)
    with pytest.raises(ValueError, match=r'backward="eager".*weight_grad'):
        grad(lambda z: plain(Head(z, weight, weight_grad=torch.zeros_like(weight)), t))(z)
    with pytest.raises(ValueError, match=r"torch.func.*inplace"):
        grad(lambda z: kd_loss(z * 1.0, t, backward="inplace"))(z)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r'backward="eager".*group='):
            eager(z, t, group=dist.group.WORLD)
        with pytest.raises(ValueError, match=r"torch.func.*group="):
            jvp(lambda z: kd_loss(z, t, group=dist.group.WORLD), (z,), (z,))
        leaf = z.clone().requires_grad_()
        assert_once(kd_loss(leaf, t, group=dist.group.WORLD), [leaf])
        assert_once(kd_loss(leaf, t, group=dist.group.WORLD, backward="recompute"), [leaf])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backward", ["fused", "recompute", "eager"])
def test_a_teacher_of_any_kind_gets_no_gradient_in_silence(backward):
    student, logits = randn(ROWS, VOCAB, dtype=torch.float32), randn(ROWS, VOCAB, dtype=torch.float32)
    ids, log_probs = torch.tensor([[0, 5], [3, 1], [2, 4]]), torch.full((3, 2), -1.5)
    makers = [
        (lambda x: x, logits),
        (lambda x: Head(x, torch.eye(VOCAB)), logits),
        (SoftLabels.dense, logits),
        (lambda x: SoftLabels.topk(ids, x, torch.full((3,), -0.6), vocab_size=VOCAB), log_probs),
        (lambda x: SoftLabels.topk(ids, log_probs, x, vocab_size=VOCAB), torch.full((3,), -0.6)),
    ]
    for make, x in makers:
        kd_loss(student, make(x), backward=backward)
        with pytest.raises(ValueError, match=r"requires? grad"):
            kd_loss(student, make(x.clone().requires_grad_()), backward=backward)
        with pytest.raises(ValueError, match=r"requires? grad"):
            grad(lambda x, make=make: kd_loss(student, make(x), backward=backward))(x)
    # Its output layer may be a model's that is trained elsewhere.
    weight = torch.eye(VOCAB, requires_grad=True)
    kd_loss(student.requires_grad_(), Head(logits, weight), backward=backward).backward()
    assert weight.grad is None


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_a_compiled_forward_mode_derivative_is_right(backward):
    torch._dynamo.reset()
    z, t, v = (randn(ROWS, VOCAB) for _ in range(3))

    def tangent(z):
        return jvp(lambda z: kd_loss(z, t, temperature=2.0, backward=backward), (z,), (v,))

    found = torch.compile(tangent, backend="aot_eager", fullgraph=True)(z)
    torch.testing.assert_close(found, jvp(lambda z: truth(z, t), (z,), (v,)), rtol=1e-9, atol=1e-12)


def test_compiled():
    torch._dynamo.reset()
    z, t = randn(ROWS, VOCAB), randn(ROWS, VOCAB)
    compiled = torch.compile(lambda z: eager(z, t), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(grad_of(compiled, z), grad_of(lambda z: truth(z, t), z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backward", ["fused", "inplace"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_second_backward_of_a_compiled_loss_is_right_or_an_error(backend, backward):
    torch._dynamo.reset()
    leaf, t = randn(ROWS, VOCAB, dtype=torch.float32).requires_grad_(), randn(ROWS, VOCAB, dtype=torch.float32)
    loss = 3.0 * torch.compile(lambda z: kd_loss(z * 1.0, t, backward=backward), backend=backend, fullgraph=True)(leaf)
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    once = once.clone()
    torch.testing.assert_close(once, 3.0 * grad_of(lambda z: kd_loss(z, t), leaf.detach()))
    if backend == "eager":
        with pytest.raises(RuntimeError, match='backward="recompute"'):
            torch.autograd.grad(loss, leaf)
    else:
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], once)


@pytest.mark.parametrize("backward", ["fused", "inplace", "recompute"])
def test_second_derivatives_of_a_loss_that_dynamo_has_traced(backward):
    torch._dynamo.reset()
    t = randn(ROWS, VOCAB, dtype=torch.float32)
    loss = torch.compile(lambda z: kd_loss(z * 1.0, t, backward=backward), backend="eager", fullgraph=True)
    leaf = randn(ROWS, VOCAB, dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=ONCE):
        torch.autograd.grad(gradient.sum(), leaf, allow_unused=True)
