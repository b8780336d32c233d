"""What a loss keeps for its backward pass: autograd sees it change, hooks meet it, and it is freed."""

import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kdfast import Head, SoftLabels, kd_loss
from kdfast.loss import saved

ROWS, VOCAB, WIDTH = 6, 9, 4
IDS = torch.tensor([[0, 5], [3, 1], [2, 4]] * 2)


def make_student(kind, dtype=torch.float32):
    """(the student, what its loss is differentiated with respect to)."""
    if kind == "logits":
        leaf = torch.randn(ROWS, VOCAB, dtype=dtype, requires_grad=True)
        return leaf, [leaf]
    leaves = [torch.randn(n, WIDTH, dtype=dtype, requires_grad=True) for n in (ROWS, VOCAB)]
    return Head(*leaves), leaves


def make_inputs():
    """Tensors that a loss may be given beside the student."""
    return {
        "logits": torch.randn(ROWS, VOCAB),
        "hidden": torch.randn(ROWS, 5),
        "weight": torch.randn(VOCAB, 5),
        "values": torch.rand(ROWS, 2) - 3.0,
        "tails": torch.full((ROWS,), -0.6),
        "prototype_ids": torch.zeros(ROWS, dtype=torch.int64),
        "prototypes": torch.rand(2, VOCAB),
        "labels": torch.randint(0, VOCAB, (ROWS,)),
        "probs": torch.rand(ROWS, VOCAB).softmax(-1),
        "row_weight": torch.rand(ROWS),
        "temperature": torch.rand(ROWS) + 1.0,
    }


def make_teacher(kind, given):
    if kind == "logits":
        return given["logits"]
    if kind == "head":
        return Head(given["hidden"], given["weight"])
    if kind == "topk":
        return SoftLabels.topk(IDS, given["values"], given["tails"], vocab_size=VOCAB)
    if kind == "dense":
        return SoftLabels.dense(given["logits"])
    return SoftLabels.prototype(
        IDS, given["values"].exp(), given["tails"], given["prototype_ids"], given["prototypes"], vocab_size=VOCAB
    )


def loss_of(student, kind, given, labels="labels", **options):
    per_row = {} if kind in ("topk", "prototype") else {"temperature": given["temperature"]}
    return kd_loss(
        student,
        make_teacher(kind, given),
        given[labels],
        ce_weight=0.5,
        row_weight=given["row_weight"],
        **per_row,
        **options,
    )


TEACHERS = ["logits", "head", "topk", "dense", "prototype"]


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("student", ["logits", "head"])
@pytest.mark.parametrize("options", [{"backward": "recompute"}, {"reduction": "none"}, {"backward": "eager"}], ids=str)
def test_an_input_that_changes_between_the_passes_changes_no_gradient_in_silence(options, student, kind):
    for labels in ("labels", "probs"):
        made, leaves = make_student(student)
        given = make_inputs()
        expected = torch.autograd.grad(loss_of(made, kind, given, labels, **options).sum(), leaves)
        for name, x in given.items():
            before = x.clone()
            loss = loss_of(made, kind, given, labels, **options).sum()
            x.copy_(x.flip(0) if name != "prototype_ids" else 1 - x)
            try:
                found = torch.autograd.grad(loss, leaves)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error), name  # noqa: PT017
            else:
                assert all(map(torch.equal, found, expected)), name
            x.copy_(before)


@pytest.mark.parametrize("kind", ["logits", "head"])
@pytest.mark.parametrize("student", ["logits", "head"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_is_freed_by_the_backward_pass(reduction, student, kind):
    made, leaves = make_student(student)
    given = make_inputs()
    loss = loss_of(made, kind, given, backward="recompute", reduction=reduction)
    kept = weakref.ref(given["logits" if kind == "logits" else "weight"])
    del given
    torch.autograd.grad(loss.sum(), leaves)
    assert kept() is None


@pytest.mark.parametrize("backward", ["fused", "recompute"])
@pytest.mark.parametrize("student", ["logits", "head"])
def test_no_cycle_keeps_a_loss_alive(student, backward):
    """And a fused one has not kept the logits or the hidden states in the first place."""
    _, (leaf, *rest) = make_student(student)
    hidden = leaf * 1.0
    made = Head(hidden, *rest) if rest else hidden
    loss = kd_loss(made, torch.randn(ROWS, VOCAB), backward=backward)
    there, there_too = weakref.ref(hidden), weakref.ref(loss)
    del made, hidden
    assert (there() is None) == (backward == "fused")
    del loss
    assert there() is None
    assert there_too() is None


@pytest.mark.parametrize("kind", TEACHERS)
def test_hooks_meet_all_that_is_kept(kind):
    made, leaves = make_student("head")
    given, met = make_inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: met.append(x.data_ptr()) or x, lambda x: x):
        loss = loss_of(made, kind, given, backward="recompute")
    wanted = {"logits": "logits", "head": "weight", "dense": "logits", "prototype": "prototypes", "topk": "tails"}[kind]
    assert {x.data_ptr() for x in (*leaves, given[wanted], given["labels"])} - set(met) <= (
        {given[wanted].data_ptr()} if kind == "topk" else set()  # whose tail is a copy
    )
    with torch.autograd.graph.save_on_cpu():
        again = loss_of(made, kind, given, backward="recompute")
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(again, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("student", ["logits", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_inference_mode_has_made(dtype, student, kind):
    torch.manual_seed(1)
    plain = make_inputs()
    with torch.inference_mode():
        made = {name: x.clone() for name, x in plain.items()}
    pupil, leaves = make_student(student, dtype)
    for labels in ("labels", "probs"):
        for options in ({}, {"backward": "recompute"}, {"backward": "eager"}, {"reduction": "none"}):
            losses = [loss_of(pupil, kind, given, labels, **options).sum() for given in (made, plain)]
            with torch.inference_mode():  # where no version is counted
                changed = made["logits"].clone()
                made["logits"].zero_()
            for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
                assert torch.equal(a, b)
            with torch.inference_mode():
                made["logits"].copy_(changed)


@pytest.mark.parametrize("backward", ["fused", "recompute", "eager"])
def test_hidden_states_that_inference_mode_has_made(backward):
    with torch.inference_mode():
        hidden = torch.randn(ROWS, WIDTH)
    weight, teacher = torch.randn(VOCAB, WIDTH, requires_grad=True), torch.randn(ROWS, VOCAB)
    losses = [kd_loss(Head(x, weight), teacher, backward=backward) for x in (hidden, hidden.clone())]
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in losses))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", ["fused", "recompute"])
@pytest.mark.parametrize("kind", ["logits", "head", "topk"])
def test_checkpoints_of_a_head(kind, backward, reentrant):
    _, leaves = make_student("head")
    given = make_inputs()

    def loss(hidden, weight):
        return 3.0 * loss_of(Head(hidden * 1.0, weight), kind, given, backward=backward)

    expected = torch.autograd.grad(loss(*leaves), leaves)
    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_a_backward_pass_without_grad_mode_or_in_inference_mode():
    teacher = torch.randn(ROWS, VOCAB)
    for backward in ("fused", "recompute", "eager"):
        for student in ("logits", "head"):
            made, leaves = make_student(student)
            expected = torch.autograd.grad(kd_loss(made, teacher, backward=backward), leaves)
            for mode in (torch.no_grad, torch.inference_mode):
                loss = kd_loss(made, teacher, backward=backward)
                with mode():
                    found = torch.autograd.grad(loss, leaves)
                assert all(map(torch.equal, found, expected))


def test_any_tree_is_taken_apart_and_put_together():
    class Kept:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    ctx, x = Kept(), torch.randn(2)
    layer = Head(x[None], x[None], scale=2.0).layer
    saved.save(ctx, x, None, layer, 3)
    assert len(ctx.saved_tensors) == 2
    ctx.saved_tensors = [x + 1.0 for x in ctx.saved_tensors]
    first, none, again, three = saved.saved(ctx)
    assert torch.equal(first, x + 1.0)
    assert (none, again.scale, again.bias, three) == (None, 2.0, None, 3)
    assert torch.equal(again.weight, layer.weight + 1.0)


def test_a_large_gradients_storage_keeps_its_size():
    """It is handed to the next gradient when it is freed. What a program means to resize, it copies."""
    student = torch.randn(64, 1 << 15, requires_grad=True)
    kd_loss(student, torch.randn(64, 1 << 15)).backward()
    with pytest.raises(RuntimeError, match="resiz"):
        student.grad.untyped_storage().resize_(0)
    student.grad.clone().untyped_storage().resize_(0)
