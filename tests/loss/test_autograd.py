"""torch.library contracts: opcheck, gradcheck, torch.compile, and what a second backward says."""

import itertools

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from kdfast import _C, KDLoss, SoftLabels, alpha_beta, jsd, kd_loss, skew_forward_kl, skew_reverse_kl
from kdfast.divergences import Divergence
from kdfast.loss import ops
from kdfast.loss.reference import Targets
from kdfast.testing import loss_and_gradient

DIVERGENCES = [
    *(Divergence(name) for name in _C.divergences()),
    jsd(0.2, normalize=True),
    skew_forward_kl(0.4),
    skew_reverse_kl(0.4),
    alpha_beta(0.0, 0.5),
    Divergence("reverse_kl", standardize=True),
    Divergence("logit_mse", standardize=True),
    Divergence("dkd", standardize=True),
]


def dense_arguments(requires_grad=True, want_parts=True, probs=False):
    student = torch.randn(2, 3, 9, requires_grad=requires_grad)
    targets = Targets(
        None if probs else torch.randint(0, 9, (6,)), torch.rand(2, 3, 9).softmax(-1) if probs else None, 0.1
    )
    teacher = ops.DenseTeacher(torch.randn(2, 3, 9), Divergence("jsd"))
    return student, *teacher.arguments(torch.rand(5, 6), targets, want_parts)


def sparse_arguments(requires_grad=True, want_parts=True, tail=True):
    student = torch.randn(2, 3, 9, requires_grad=requires_grad)
    ids = torch.stack([torch.randperm(9)[:2] for _ in range(6)]).int().flatten()
    log_tail = torch.rand(6).log() if tail else None
    teacher = ops.SparseTeacher(
        ids, torch.rand(12), torch.arange(7) * 2, log_tail, 9, Divergence("forward_kl" if tail else "soft_ce")
    )
    targets = Targets(torch.randint(0, 9, (6,)), None, 0.1)
    return student, *teacher.arguments(torch.rand(5, 6), targets, want_parts)


@pytest.mark.parametrize("suffix", ["", "_grad", "_inplace"])
@pytest.mark.parametrize("want_parts", [True, False])
@pytest.mark.parametrize("variant", [True, False])
def test_opcheck_of_the_row_ops(suffix, want_parts, variant):
    # What computes gradients has no derivative: the autograd functions around it are handed what requires grad.
    grads = suffix == ""
    opcheck(getattr(torch.ops.kdfast, "dense_rows" + suffix), dense_arguments(grads, want_parts, probs=variant))
    opcheck(getattr(torch.ops.kdfast, "sparse_rows" + suffix), sparse_arguments(grads, want_parts, tail=variant))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_opcheck_of_scale(factor):
    opcheck(torch.ops.kdfast.scale_, (torch.randn(3, 5), torch.tensor(factor)))
    opcheck(torch.ops.kdfast.scale_, (torch.randn(3, 5).bfloat16(), torch.tensor(factor)))


def test_every_op_is_checked_here():
    ops = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kdfast::")}
    rows = {a + b for a, b in itertools.product(("dense_rows", "sparse_rows"), ("", "_grad", "_inplace"))}
    selectors = {"select_threshold", "select_sample", "select_top"}  # without a gradient: test_select checks them
    on_gpu = {a + b for a, b in itertools.product(("dense_rows", "sparse_rows"), ("_cluster", "_resident"))}
    whole = {name for name in ops if name.endswith("_whole")}  # for torch.compile: autograd functions, checked there
    assert whole == {
        a + b for a, b in itertools.product(("dense_rows", "sparse_rows"), ("_grad_whole", "_inplace_whole"))
    }
    assert ops - on_gpu - whole == rows | selectors | {"scale_"}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradcheck_dense(divergence, reduction):
    student = (torch.randn(3, 6, dtype=torch.float64) * 2).requires_grad_()
    teacher, labels = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 5, -100])
    loss = KDLoss(
        divergence=divergence,
        temperature=2.0,
        ce_weight=0.3,
        z_weight=0.1,
        label_smoothing=0.1,
        reduction=reduction,
    )
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels), student)


@pytest.mark.parametrize("kind", ["topk", "weights"])
def test_gradcheck_sparse(kind):
    student = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 5], [3, 1], [2, 4]])
    if kind == "topk":
        labels = SoftLabels.topk(ids, torch.full((3, 2), -1.5), torch.full((3,), -0.6), vocab_size=6)
    else:
        labels = SoftLabels.weights(ids, torch.rand(3, 2), vocab_size=6)
    divergence = "forward_kl" if kind == "topk" else "soft_ce"
    assert torch.autograd.gradcheck(
        lambda s: kd_loss(s, labels, torch.tensor([1, 2, 3]), divergence=divergence, ce_weight=0.5), student
    )


COMPILED = [
    {"temperature": 2.0, "ce_weight": 0.5},
    {"temperature": 2.0, "ce_weight": 0.5, "backward": "recompute"},
    {"temperature": 2.0, "ce_weight": 0.5, "backward": "inplace"},
    {"divergence": "jsd", "reduction": "none"},
    {"ce_weight": 1.0, "shift": True, "label_smoothing": 0.1},
    {"divergence": Divergence("reverse_kl", standardize=True), "return_parts": True},
]


# torch.compile's own internals warn of what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", COMPILED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_is_eager(options, dtype):
    torch._dynamo.reset()
    student, teacher = torch.randn(2, 5, 30).to(dtype), torch.randn(2, 5, 30).to(dtype)
    labels = torch.randint(0, 30, (2, 5))

    def step(s, t, y):
        out = kd_loss(s * 1.0, t, y, **options)
        return out if isinstance(out, tuple) else (out, None)

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaf = student.clone().requires_grad_()
        loss, parts = run(leaf, teacher, labels)
        loss.sum().mul(3.0).backward()
        results.append((loss.detach(), leaf.grad, *(parts or ())))
    for eager, compiled in zip(*results, strict=True):
        # Inductor adds rows, and builds their coefficients, in an order of its own.
        torch.testing.assert_close(compiled, eager, rtol=2e-6 if dtype == torch.float32 else 8e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_with_soft_labels_and_dynamic_shapes():
    torch._dynamo.reset()
    step = torch.compile(lambda s, t: kd_loss(s, t, temperature=2.0), fullgraph=True, dynamic=True)
    for rows, columns in ((4, 50), (7, 33)):
        log_probs, ids = torch.randn(rows, columns).log_softmax(1).topk(5)
        teacher = SoftLabels.topk(ids, log_probs, torch.rand(1, rows).log(), vocab_size=columns, temperatures=(2.0,))
        student = torch.randn(rows, columns)
        torch.testing.assert_close(step(student, teacher), kd_loss(student, teacher, temperature=2.0))
        dense = torch.randn(rows, columns)
        torch.testing.assert_close(step(student, dense), kd_loss(student, dense, temperature=2.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_schedule_does_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda s, t, tau: kd_loss(s, t, temperature=tau), backend=counter, fullgraph=True)
    student, teacher = torch.randn(4, 20), torch.randn(4, 20)
    for tau in (1.0, 2.0, 3.0):
        step(student, teacher, torch.tensor(tau))
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["fused", "inplace"])
def test_a_second_backward_names_the_remedy(mode):
    hidden = torch.randn(3, 7, requires_grad=True) * 1.0
    loss = kd_loss(hidden, torch.randn(3, 7), backward=mode)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='backward="recompute"'):
        loss.backward()


def test_recompute_allows_several_backwards():
    student, teacher = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    loss = kd_loss(student, teacher, backward="recompute")
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert torch.allclose(student.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_once_differentiable_and_says_so(mode, dtype):
    student = torch.randn(3, 7, dtype=dtype, requires_grad=True)
    loss = kd_loss(student, torch.randn(3, 7, dtype=dtype), backward=mode)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"once differentiable"):
        grad.sum().backward()


def test_inplace_bumps_the_version():
    """What autograd saved of the logits before must not be used after."""
    leaf = torch.randn(3, 7, requires_grad=True)
    hidden = leaf * 1.0
    other = hidden.square().sum()
    loss = kd_loss(hidden, torch.randn(3, 7), backward="inplace")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_checkpointing_and_two_losses_on_the_same_logits():
    student, teacher = torch.randn(5, 30), torch.randn(5, 30)
    plain = loss_and_gradient(student, teacher, temperature=2.0)[1]
    leaf = student.clone().requires_grad_()
    checkpoint(lambda s: kd_loss(s * 1.0, teacher, temperature=2.0), leaf, use_reentrant=False).backward()
    assert torch.allclose(leaf.grad, plain)
    leaf = student.clone().requires_grad_()
    (kd_loss(leaf, teacher, temperature=2.0) + kd_loss(leaf, teacher, temperature=2.0)).backward()
    assert torch.allclose(leaf.grad, 2 * plain)


def test_under_autocast():
    model, x = torch.nn.Linear(8, 20), torch.randn(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss = kd_loss(logits, torch.randn(6, 20), temperature=2.0)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["dense_rows", "sparse_rows"])
def test_devices_without_a_kernel_run_the_reference(name):
    """The fallback under the same schemas, called directly: it is what a device without a kernel dispatches to."""
    arguments = dense_arguments(False) if name == "dense_rows" else sparse_arguments(False)
    native = getattr(torch.ops.kdfast, name + "_grad")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    fallback = native.default.redispatch(keys, *arguments)
    for ours, slow in zip(native(*arguments), fallback, strict=True):
        assert torch.allclose(ours, slow, rtol=1e-4, atol=1e-6)
