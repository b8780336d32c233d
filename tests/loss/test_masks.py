"""Masks as people have them: bool or integers, of tokenizers and collators, with and without a shift of the labels."""

import pytest
import torch
import torch.nn.functional as F

from kdfast import Head, SoftLabels, global_items, kd_loss
from kdfast.loss import label_values, row_layout
from kdfast.masks import as_mask
from kdfast.objectives import Hint, attention_transfer, entropy_matching
from kdfast.testing import loss_and_gradient

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
OPTIONS = {"temperature": 2.0, "ce_weight": 0.5}


def batch(side="right"):
    """Logits, ids and the ``attention_mask`` of two sequences, of which one is padded."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 11, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return student, teacher, torch.randint(0, 11, (2, 5)), real if side == "right" else real.flip(-1)


def eager(student, teacher, labels, mask):
    """The mean over the rows of a bool mask, in plain PyTorch."""
    s, t, y = student[mask], teacher[mask], labels[mask]
    kd = F.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), log_target=True, reduction="batchmean")
    return 4 * kd + 0.5 * F.cross_entropy(s, y)


def with_gradient(student, loss):
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS], ids=str)
def test_an_integer_row_weight_is_a_mask(dtype):
    student, teacher, labels, real = batch()
    ours = loss_and_gradient(student, teacher, labels, row_weight=real.to(dtype), **OPTIONS)
    expected = with_gradient(student, lambda s: eager(s, teacher, labels, real.bool()))
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b)
    weights = kd_loss(student, teacher, labels, row_weight=real.double(), **OPTIONS)
    assert torch.allclose(weights, 0.8 * expected[0])  # numbers leave the denominator as it is: 8 rows of 10


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_with_shift_a_mask_is_the_labels(dtype, side):
    """As Hugging Face has it: logits[:, :-1], labels[:, 1:], mask[:, 1:]. No real token predicts padding."""
    student, teacher, labels, real = batch(side)
    mask = real.to(dtype)
    expected = with_gradient(student, lambda s: eager(s[:, :-1], teacher[:, :-1], labels[:, 1:], real[:, 1:].bool()))
    for given in (mask, mask[:, 1:], mask[..., None]):
        ours = loss_and_gradient(student, teacher, labels, row_weight=given, shift=True, **OPTIONS)
        for a, b in zip(ours, expected, strict=True):
            assert torch.allclose(a, b)
    rows = kd_loss(student, teacher, labels, row_weight=mask, shift=True, reduction="none", **OPTIONS)
    assert torch.equal(rows != 0.0, real[:, 1:].bool())
    head = Head(student.float(), torch.eye(11))
    assert torch.allclose(
        kd_loss(head, teacher.float(), labels, row_weight=mask, shift=True, **OPTIONS).double(), expected[0]
    )


def test_with_shift_numbers_are_the_logits():
    student, teacher, labels, _ = batch()
    weight, tau = torch.rand(2, 2, 5, dtype=torch.float64) + 0.5
    ours = kd_loss(student, teacher, labels, shift=True, row_weight=weight, temperature=tau)
    sliced = (student[:, :-1], teacher[:, :-1], labels[:, 1:])
    expected = kd_loss(*sliced, row_weight=weight[:, :-1], temperature=tau[:, :-1])
    assert torch.allclose(ours, expected, rtol=1e-12)
    shorter = kd_loss(student, teacher, labels, shift=True, row_weight=weight[:, :-1], temperature=tau[:, :-1])
    assert torch.equal(shorter, ours)


@pytest.mark.parametrize("shift", [False, True])
def test_items_are_counted_under_the_same_mask(shift):
    student, teacher, labels, real = batch()
    labels[1, 2] = -100
    for mask in (real, real.bool(), *([real[:, 1:]] if shift else [])):
        items = global_items(labels, mask=mask, shift=shift)
        options = {"row_weight": mask, "shift": shift, **OPTIONS}
        assert torch.allclose(
            kd_loss(student, teacher, labels, num_items=items, **options), kd_loss(student, teacher, labels, **options)
        )


def test_integers_that_are_no_mask_are_refused_or_make_the_loss_nan(monkeypatch):
    student, teacher, labels, real = batch()
    with pytest.raises(ValueError, match=r"row_weight of torch.int64 is a mask.*from 0 to 3.*row_weight.float\(\)"):
        kd_loss(student, teacher, row_weight=real * 3)
    # On a device, where nobody has looked, they are no weights in silence.
    monkeypatch.setattr("kdfast.masks.can_look", lambda x: False)
    monkeypatch.setattr(row_layout, "can_look", lambda x: False)
    assert kd_loss(student, teacher, row_weight=real * 3).isnan()
    ours = kd_loss(student, teacher, labels, row_weight=real, **OPTIONS)
    assert torch.allclose(ours, eager(student, teacher, labels, real.bool()))
    monkeypatch.setenv("KDFAST_CHECK", "1")
    with pytest.raises(ValueError, match="from 0 to 3"):
        kd_loss(student, teacher, row_weight=real * 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_every_mask_takes_integers(dtype):
    student, teacher, _, real = batch()
    mask, hint = real.to(dtype), Hint(11, 11)
    rows = student[real.bool()], teacher[real.bool()]
    assert torch.allclose(hint(student, teacher, mask), (rows[0] - rows[1]).square().mean())
    assert torch.equal(attention_transfer(student, teacher, mask), attention_transfer(student, teacher, real.bool()))
    assert torch.allclose(entropy_matching(student, teacher, row_weight=mask), entropy_matching(*rows))
    labels = SoftLabels.dense(teacher.flatten(0, 1), present=mask.flatten())
    assert torch.allclose(kd_loss(student, labels), kd_loss(*rows))


def test_what_is_no_mask_is_named():
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"m must be a bool tensor of \(2, 3\), got torch.float32.*m != 0"):
        as_mask("m", ones, (2, 3))
    with pytest.raises(ValueError, match=r"m must be .*\(2, 3\), got torch.bool \(3, 2\)"):
        as_mask("m", ones.T > 0, (2, 3))
    with pytest.raises(ValueError, match=r"m of torch.int32 is a mask of 0 and 1, got values from -1 to 1"):
        as_mask("m", torch.tensor([-1, 0, 1], dtype=torch.int32), (3,))
    with pytest.raises(TypeError, match=r"m must be a bool tensor of \(2,\), got list"):
        as_mask("m", [True, False], (2,))


def test_a_label_outside_the_mask_may_be_anything():
    student, teacher, labels, real = batch()
    clean = kd_loss(student, teacher, labels, row_weight=real, **OPTIONS)
    labels[0, 3:] = torch.tensor([99, -7])
    assert torch.equal(kd_loss(student, teacher, labels, row_weight=real, **OPTIONS), clean)
    assert torch.equal(kd_loss(student, teacher, labels, row_weight=real.double(), num_items=8, **OPTIONS), clean)


@pytest.mark.parametrize("shift", [False, True])
def test_nothing_waits_for_a_device(shift):
    """A tensor without data fails whoever looks at it."""
    student, teacher, labels, real = (x.to("meta") for x in batch())
    two = torch.tensor(2.0, device="meta")
    for row_weight in (real, real.bool(), real.double()):
        loss, parts = kd_loss(
            student, teacher, labels, row_weight=row_weight, shift=shift, temperature=two, teacher_temperature=two,
            kd_weight=two, ce_weight=real.double(), z_weight=two, num_items=two, return_parts=True,
        )  # fmt: skip
        assert loss.device.type == parts.kd.device.type == "meta"
    assert kd_loss(student, teacher, teacher, ce_weight=1.0, row_weight=real).device.type == "meta"
    assert global_items(labels, mask=real, shift=shift).device.type == "meta"


def test_compiled_masks_need_no_look(monkeypatch):
    """Nothing may look at values inside a graph."""
    student, teacher, labels, real = batch()
    for module in ("kdfast.masks", "kdfast.loss.label_values", "kdfast.loss.first_look"):
        monkeypatch.setattr(f"{module}.can_look", lambda x: not torch.compiler.is_compiling())
    compiled = torch.compile(kd_loss, fullgraph=True, backend="eager")
    ours = compiled(student, teacher, labels, row_weight=real, shift=True, temperature=2.0, ce_weight=0.5)
    assert torch.allclose(ours, kd_loss(student, teacher, labels, row_weight=real, shift=True, **OPTIONS))
    assert label_values.can_look(real)


@pytest.mark.parametrize("check", ["0", "1"])
def test_labels_that_only_mark_rows_may_be_of_any_class(monkeypatch, check):
    """KDFAST_CHECK changes nothing about which labels are wrong: those that a term needs, of rows that weigh."""
    monkeypatch.setenv("KDFAST_CHECK", check)
    student, teacher, labels, real = batch()
    others = torch.where(real == 1, labels + 100, -100)  # of a larger vocabulary, where only -100 matters
    assert torch.equal(kd_loss(student, teacher, others), kd_loss(student[real == 1], teacher[real == 1]))
    for bad, message in ((others, "got 1[0-9][0-9] among"), (labels - 20, "got -")):
        with pytest.raises(ValueError, match=message):
            kd_loss(student, teacher, bad, ce_weight=1.0)
        kd_loss(student, teacher, bad, ce_weight=1.0, row_weight=torch.zeros(2, 5))  # no row weighs anything
    with pytest.raises(ValueError, match="got -"):
        kd_loss(student, teacher, labels - 20)
