"""A teacher of one domain, a student of another that has no labels."""

import copy
from dataclasses import replace

import pytest
import torch

from kdfast import SoftLabels
from kdfast.distill import KD
from kdfast.recipes import Adversarial, CrossDomain, Unlabelled, confident, discriminator
from support.recipes import Counting, accuracy, batches, blobs, make_step, mlp, weights_of


def test_confident_rows_only_and_the_mean_is_over_all():
    step = make_step(rows=12, labels=False)
    best = step.teacher.softmax(-1).amax(-1)
    mask = best >= best.median()
    threshold = float(best.median())
    for teacher in (step.teacher, SoftLabels.dense(step.teacher)):
        ours = KD(kd_weight=1.0, ce_weight=0.0, row_weight=confident(threshold))(replace(step, teacher=teacher))
        kept = KD(kd_weight=1.0, ce_weight=0.0)(replace(step, student=step.student[mask], teacher=step.teacher[mask]))
        assert torch.allclose(ours, kept * mask.sum() / 12)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1\.5"):
        confident(1.5)


def test_labels_of_the_target_change_nothing():
    torch.manual_seed(1)
    source, (inputs, labels) = batches(*blobs()), blobs(shift=0.5, seed=1)
    start, results = (mlp(hidden=12), mlp()), []
    for truth in (labels, labels.flip(0)):
        teacher, student = (copy.deepcopy(model) for model in start)
        CrossDomain(teacher, student).fit(source, batches(inputs, truth), epochs=2, rounds=2, progress=False)
        results.append(weights_of(student))
    assert torch.equal(*results)
    step = make_step()
    assert torch.equal(Unlabelled(KD(kd_weight=1.0, ce_weight=0.0))(step), KD(kd_weight=1.0, ce_weight=0.0)(step))
    with pytest.raises(ValueError, match="labels are required"):
        Unlabelled(KD())(step)


def test_the_student_learns_the_target_from_a_teacher_of_the_source():
    torch.manual_seed(1)
    teacher, student = mlp(hidden=16), mlp()
    inputs, labels = blobs(96, shift=0.3, seed=1)
    recipe = CrossDomain(teacher, student, lr=0.02, confidence=0.6)
    histories = recipe.fit(batches(*blobs(96)), batches(inputs, labels), epochs=8, rounds=2, progress=False)
    assert [len(history) for history in histories] == [8, 8]
    assert accuracy(teacher, *blobs(96)) > 0.9
    assert accuracy(student, inputs, teacher(inputs).argmax(1)) > 0.9


def test_the_next_rounds_teacher_is_the_student_as_it_was():
    asked = []

    def remember(step):
        asked.append((step.teacher, step.student.detach()))
        return KD(kd_weight=1.0, ce_weight=0.0)(step)

    inputs = blobs()[0]
    teacher, student = mlp(hidden=12), mlp()
    given, before = weights_of(teacher), teacher(inputs).detach()
    CrossDomain(teacher, student, objective=remember).fit(None, [inputs], epochs=2, rounds=2, progress=False)
    assert torch.equal(weights_of(teacher), given)
    assert torch.equal(asked[0][0], before)
    assert torch.equal(asked[1][0], before)
    assert torch.equal(asked[2][0], asked[2][1])
    assert torch.equal(asked[3][0], asked[2][0])
    assert not torch.equal(asked[3][0], before)


def test_a_teacher_that_is_never_sure_teaches_nothing():
    student, inputs = mlp(), blobs()[0]
    before = weights_of(student)
    CrossDomain(mlp(), student, confidence=1.0, optimizer=lambda x: torch.optim.SGD(x, 0.1)).fit(
        None, [inputs], epochs=2, progress=False
    )
    assert torch.equal(weights_of(student), before)


def test_what_the_objective_has_to_train_is_trained():
    judge = discriminator(3)
    before = weights_of(judge)
    CrossDomain(mlp(), mlp(), objective=Adversarial(judge)).fit(None, [blobs()[0]], epochs=1, rounds=2, progress=False)
    assert not torch.equal(weights_of(judge), before)


@pytest.mark.parametrize("resume", [False, True])
def test_the_teacher_resumes_where_the_student_does(tmp_path, resume):
    source, calls = batches(*blobs()), []
    for _ in range(2):
        teacher = Counting(mlp())
        recipe = CrossDomain(teacher, mlp(), folder=tmp_path)
        recipe.fit(source, [blobs()[0]], epochs=1, resume=resume, progress=False)
        calls.append(teacher.calls)
    assert calls == [4, 0 if resume else 4]


def test_misuse():
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\]"):
        CrossDomain(mlp(), mlp(), confidence=2.0)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        CrossDomain(mlp(), mlp()).fit(None, [blobs()[0]], epochs=1, rounds=0)
    model = mlp()
    with pytest.raises(TypeError, match="must be a function that makes one"):
        CrossDomain(mlp(), model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
