"""KD: kd_loss of a step, whatever the step's teacher is."""

import pytest
import torch
from torch.nn import functional as F

from kdfast import SoftLabels, kd_loss
from kdfast.distill import KD, Step
from kdfast.recipes import HardTargets

LABELS = torch.tensor([0, 2, -100, 3])


@pytest.fixture
def outputs():
    return torch.randn(4, 5, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)


def test_it_is_the_textbook_s_loss(outputs):
    student, teacher = outputs
    counted = LABELS != -100
    soft = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1), log_target=True, reduction="none")
    expected = 0.9 * 9 * soft.sum(-1)[counted].mean() + 0.1 * F.cross_entropy(student, LABELS)
    loss = KD(temperature=3.0, kd_weight=0.9, ce_weight=0.1)(Step(student, teacher, LABELS))
    torch.testing.assert_close(loss, expected)


def test_defaults_are_named_weights_of_a_half(outputs):
    loss = KD()(Step(*outputs, LABELS))
    assert torch.equal(loss, kd_loss(*outputs, LABELS, temperature=2.0, kd_weight=0.5, ce_weight=0.5))


def test_outputs_with_logits_and_soft_labels_are_teachers(outputs):
    student, teacher = outputs
    loss = KD()(Step(student, teacher, LABELS))
    assert torch.equal(loss, KD()(Step({"logits": student}, {"logits": teacher}, LABELS)))
    assert torch.equal(loss, KD()(Step(student, SoftLabels.dense(teacher), LABELS)))


def test_an_option_may_be_a_function_of_the_step(outputs):
    objective = KD(temperature=lambda step: 4.0 - 3.0 * step.progress, kd_weight=1.0, ce_weight=0.0)
    for progress, tau in ((0.0, 4.0), (0.5, 2.5)):
        assert torch.equal(objective(Step(*outputs, progress=progress)), kd_loss(*outputs, temperature=tau))


def test_without_a_teacher_it_is_cross_entropy(outputs):
    loss = KD(ce_weight=0.1, label_smoothing=0.2)(Step(outputs[0], None, LABELS))
    torch.testing.assert_close(loss, F.cross_entropy(outputs[0], LABELS, label_smoothing=0.2))
    with pytest.raises(ValueError, match="labels are required"):
        KD()(Step(outputs[0]))


@pytest.mark.parametrize("shift", [False, True])
def test_padding_does_not_count(shift):
    """Two sequences of 3 and 5 tokens, padded on either side, give what they give without padding."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 7, dtype=torch.double)
    ids = torch.randint(0, 7, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"kd_weight": 0.5, "ce_weight": 0.5, "temperature": 2.0, "shift": shift}
    loss = KD(**options)(Step(student, teacher, ids, {"input_ids": ids, "attention_mask": mask}))
    parts = [
        kd_loss(student[i, a:], teacher[i, a:], ids[i, a:], reduction="sum", **options) for i, a in ((0, 2), (1, 0))
    ]
    torch.testing.assert_close(loss, sum(parts) / (8 - 2 * shift))


def test_classes_that_differ_are_refused_where_they_are_few(outputs):
    with pytest.raises(ValueError, match="student has 5 classes, the teacher 6"):
        KD()(Step(outputs[0], torch.randn(4, 6), LABELS))
    loss = KD(ce_weight=0.0)(Step(torch.randn(4, 1000), torch.randn(4, 1024)))
    assert loss.isfinite()


def test_mistakes_are_named(outputs):
    with pytest.raises(TypeError, match="no option alpha, reduction"):
        KD(alpha=0.5, reduction="sum")
    with pytest.raises(ValueError, match="2 teachers"):
        KD()(Step(outputs[0], (outputs[1], outputs[1]), LABELS))
    with pytest.raises(ValueError, match="requires grad"):
        KD()(Step(outputs[0], outputs[1].requires_grad_(), LABELS))
    with pytest.raises(TypeError, match="without logits"):
        KD()(Step(3.0, outputs[1], LABELS))
    assert repr(KD(shift=True)) == "KD(temperature=2.0, kd_weight=0.5, ce_weight=0.5, shift=True)"


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("objective", [KD, HardTargets])
def test_padding_does_not_count_whatever_the_row_weights_say(objective, shift):
    """Of bool weights it leaves the denominator, of numbers too; both give what sequences without padding give."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 7, dtype=torch.double)
    ids, weight = torch.randint(0, 7, (2, 5)), torch.rand(2, 5, dtype=torch.double)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    make = lambda **options: objective(shift=shift, **options)  # noqa: E731
    for weights in (weight, weight > 0.3):
        padded = Step(student, teacher, ids, {"input_ids": ids, "attention_mask": mask})
        loss = make(row_weight=weights)(padded)
        parts, counts = [], []
        for i, a in ((0, 2), (1, 0)):
            own = weights[i, a:]
            # A mask is of the labels; the first of them is nobody's to predict.
            counts.append(int(own[int(shift) :].sum()) if own.dtype == torch.bool else len(own) - shift)
            parts.append(make(row_weight=own)(Step(student[i, a:], teacher[i, a:], ids[i, a:])) * counts[-1])
        torch.testing.assert_close(loss, sum(parts) / sum(counts))
    if shift:
        torch.testing.assert_close(make(row_weight=weight[:, :-1])(padded), make(row_weight=weight)(padded))
    with pytest.raises(ValueError, match="row_weight must be"):
        make(row_weight=weight[0])(padded)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_a_mask_of_integers_meets_padding(dtype):
    """The answer of a chat, as a collator marks it: the positions before its tokens predict it."""
    student, teacher = torch.randn(2, 2, 6, 7, dtype=torch.double)
    ids, real = torch.randint(0, 7, (2, 6)), torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    answer = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    step = Step(student, teacher, ids, {"input_ids": ids, "attention_mask": real})
    rows = (answer * real)[:, 1:].bool()
    sliced = (student[:, :-1][rows], teacher[:, :-1][rows], ids[:, 1:][rows])
    expected = kd_loss(*sliced, temperature=2.0, kd_weight=0.5, ce_weight=0.5)
    for mask in (answer.to(dtype), answer[:, 1:].to(dtype)):
        torch.testing.assert_close(KD(shift=True, row_weight=lambda step, mask=mask: mask)(step), expected)
    with pytest.raises(ValueError, match=r"row_weight of torch.int64 is a mask.*from 0 to 2"):
        KD(shift=True, row_weight=2 * answer)(step)


def test_narrow_labels_count_as_wide_ones():
    student, teacher = torch.randn(2, 2, 5, 7)
    labels, pad = torch.randint(0, 7, (2, 5)), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    expected = KD(shift=True)(Step(student, teacher, labels.masked_fill(pad, -100)))
    narrow = labels.masked_fill(pad, 255).to(torch.uint8)
    assert torch.equal(KD(shift=True, ignore_index=255)(Step(student, teacher, narrow)), expected)
