"""Rounds of training: teacher and student in turn, and a weight by the measured gap."""

from functools import partial

import pytest
import torch
from torch import nn

from kdfast import Distiller
from kdfast.recipes import AdaptiveKD, Bootstrap
from support.recipes import batches, blobs, mlp, recorded, weights_of


def test_bootstrap_takes_turns_and_whoever_teaches_stands_still():
    log, moved = [], []
    teacher, student = (recorded(mlp(hidden=h), log, name) for h, name in ((12, "t"), (4, "s")))
    bootstrap = Bootstrap(teacher, student, optimizer=partial(torch.optim.SGD, lr=0.1))
    last = [weights_of(student), weights_of(teacher)]

    def look(record):
        now = [weights_of(student), weights_of(teacher)]
        moved.append([not torch.equal(a, b) for a, b in zip(last, now, strict=True)])
        last[:] = now

    histories = bootstrap.fit(batches(*blobs()), rounds=2, epochs=1, progress=False, on_epoch=look)
    assert [len(turns) for turns in histories] == [2, 2]
    assert moved == [[True, False], [False, True]] * 2
    assert log == ([("s", True), ("t", False)] * 3 + [("t", True), ("s", False)] * 3) * 2


def test_bootstrap_trains_on_hard_examples():
    inputs, labels = blobs(16)
    student = nn.Linear(4, 3)
    losses = nn.functional.cross_entropy(student(inputs), labels, reduction="none").detach()
    hard = losses.topk(4).indices
    expected = nn.Linear(4, 3)
    expected.load_state_dict(student.state_dict())
    make, teacher = partial(torch.optim.SGD, lr=0.1), mlp()
    Distiller(expected, teacher, optimizer=make).fit([(inputs[hard], labels[hard])], epochs=1, progress=False)
    Bootstrap(teacher, student, hard_share=0.25, optimizer=make).fit(
        [(inputs, labels)], rounds=1, epochs=1, progress=False
    )
    assert torch.allclose(weights_of(student), weights_of(expected), atol=1e-6)


def test_bootstrap_misuse():
    model = mlp()
    with pytest.raises(ValueError, match="needs two models"):
        Bootstrap(model, model)
    with pytest.raises(ValueError, match="ce_weight must be positive"):
        Bootstrap(model, mlp(), ce_weight=0.0)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        Bootstrap(model, mlp()).fit(batches(*blobs()), rounds=0, epochs=1)


def adaptive(scores, **options):
    """Fits on data where the student scores what ``scores`` say."""
    told = iter(scores)
    recipe = AdaptiveKD(mlp(), mlp(), teacher_score=0.9, low=0.2, high=0.8, **options)
    plan = {
        "eval_loader": batches(*blobs()),
        "metrics": lambda distiller, loader: {"accuracy": next(told)},
        "progress": False,
    }
    recipe.fit(batches(*blobs()), rounds=len(scores), epochs=1, **plan)
    return recipe


def test_the_weight_follows_the_gap():
    recipe = adaptive([0.5, 0.7, 0.8, 0.3])
    assert recipe.gaps == pytest.approx([0.4, 0.2, 0.1, 0.6])
    # Half the first gap, then a quarter of it.
    assert recipe.kd_weights == pytest.approx([0.8, 0.8, 0.5, 0.35])
    assert recipe.next_weight() == pytest.approx(0.8)


def test_it_stops_when_the_student_is_good_enough():
    recipe = adaptive([0.5, 0.88, 0.2], tolerance=0.05)
    assert recipe.gaps == pytest.approx([0.4, 0.02])
    assert adaptive([0.95, 0.2]).gaps == pytest.approx([-0.05])


def test_a_round_is_trained_with_its_weight_and_the_optimizer_is_kept():
    torch.manual_seed(1)
    teacher, student = mlp(), mlp()
    expected = mlp()
    expected.load_state_dict(student.state_dict())
    told = iter([0.5, 0.7, 0.7])
    plan = {
        "eval_loader": batches(*blobs()),
        "metrics": lambda distiller, loader: {"accuracy": next(told)},
        "progress": False,
    }
    recipe = AdaptiveKD(student, teacher, teacher_score=0.9, low=0.2, high=0.8, schedule="cosine")
    recipe.fit(batches(*blobs()), rounds=3, epochs=1, **plan)
    optimizer = torch.optim.AdamW(expected.parameters(), 1e-3)
    for weight in recipe.kd_weights:
        options = {"temperature": 2.0, "kd_weight": weight, "ce_weight": 1 - weight, "schedule": "cosine"}
        Distiller(expected, teacher, optimizer=optimizer, **options).fit(batches(*blobs()), epochs=1, progress=False)
    assert recipe.kd_weights == pytest.approx([0.8, 0.8, 0.5])
    assert torch.equal(weights_of(student), weights_of(expected))


def test_adaptive_misuse():
    with pytest.raises(ValueError, match=r"0 <= low <= high <= 1, got low=0\.9 and high=0\.1"):
        AdaptiveKD(mlp(), mlp(), teacher_score=0.9, low=0.9, high=0.1)
    with pytest.raises(ValueError, match="no record has 'f2'"):
        adaptive([0.5], monitor="f2")
