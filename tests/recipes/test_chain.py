"""Students that become teachers, and teachers that become students."""

from functools import partial

import pytest
import torch
from torch import nn

from kdfast import Distiller
from kdfast.recipes import AdaptiveKD, Bootstrap, BornAgain, Chain, TeacherAssistants
from support.recipes import Counting, accuracy, batches, blobs, mlp, weights_of

SOFT = {"kd_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0}


def data(samples=48):
    return batches(*blobs(samples))


def recorded(model, log, name):
    """Writes ``name`` and whether it trains, at every call."""
    model.register_forward_pre_hook(lambda module, arguments: log.append((name, module.training)))
    return model


def test_each_link_learns_from_the_one_before():
    log = []
    teacher, first, second = (recorded(mlp(hidden=h), log, name) for h, name in ((12, "t"), (8, "a"), (4, "s")))
    histories = TeacherAssistants(teacher, [first, second]).fit(data(), epochs=1, progress=False)
    assert [len(history) for history in histories] == [1, 1]
    assert log == [("a", True), ("t", False)] * 3 + [("s", True), ("a", False)] * 3


def test_a_chain_hands_the_teachers_knowledge_down():
    torch.manual_seed(1)
    teacher, (inputs, labels) = mlp(hidden=16), blobs(96)
    Distiller(teacher, lr=0.02).fit(batches(inputs, labels), epochs=8, progress=False)
    assistant, student = mlp(hidden=10), mlp(hidden=6)
    unlabelled = [inputs[i : i + 16] for i in range(0, 96, 16)]
    TeacherAssistants(teacher, [assistant, student], lr=0.02, **SOFT).fit(unlabelled, epochs=12, progress=False)
    assert accuracy(student, inputs, teacher(inputs).argmax(1)) > 0.9


def test_the_first_generation_learns_from_labels_alone():
    torch.manual_seed(1)
    ours, alone = mlp(), mlp()
    alone.load_state_dict(ours.state_dict())
    born_again = BornAgain(None, [ours, mlp()], lr=0.01)
    born_again.fit(data(), epochs=2, progress=False)
    Distiller(alone, lr=0.01).fit(data(), epochs=2, progress=False)
    assert torch.equal(weights_of(ours), weights_of(alone))
    x = blobs()[0]
    mean = sum(model(x).softmax(-1) for model in born_again.students) / 2
    assert torch.allclose(born_again.ensemble(x).logits.exp(), mean, atol=1e-6)


def test_a_chain_goes_on_where_it_was_stopped(tmp_path):
    def train(folder):
        torch.manual_seed(1)
        students = [Counting(mlp()) for _ in range(2)]
        BornAgain(None, students, folder=folder).fit(data(), epochs=2, progress=False)
        return students

    first, again = train(tmp_path), train(tmp_path)
    assert [student.calls for student in again] == [0, 0]
    assert torch.equal(weights_of(first[1]), weights_of(again[1]))


def test_chain_misuse():
    model = mlp()
    with pytest.raises(ValueError, match="each a model of its own, got 2"):
        Chain(None, [model, model])
    with pytest.raises(ValueError, match="each a model of its own, got 0"):
        Chain(None, [])
    with pytest.raises(ValueError, match=r"pass \[assistant, ..., student\], got one"):
        TeacherAssistants(mlp(hidden=12), [mlp()])
    with pytest.raises(ValueError, match=r"fewer parameters than the one before, got \[67, 99, 35\]"):
        TeacherAssistants(mlp(hidden=8), [mlp(hidden=12), mlp(hidden=4)])
    with pytest.raises(ValueError, match="generations are of one architecture"):
        BornAgain(None, [mlp(), mlp(hidden=4)])
    with pytest.raises(TypeError, match="must be a function that makes one of the parameters here"):
        Chain(None, [model], optimizer=torch.optim.SGD(model.parameters(), 0.1))


def test_bootstrap_takes_turns_and_whoever_teaches_stands_still():
    log, moved = [], []
    teacher, student = (recorded(mlp(hidden=h), log, name) for h, name in ((12, "t"), (4, "s")))
    bootstrap = Bootstrap(teacher, student, optimizer=partial(torch.optim.SGD, lr=0.1))
    last = [weights_of(student), weights_of(teacher)]

    def look(record):
        now = [weights_of(student), weights_of(teacher)]
        moved.append([not torch.equal(a, b) for a, b in zip(last, now, strict=True)])
        last[:] = now

    histories = bootstrap.fit(data(), rounds=2, epochs=1, progress=False, on_epoch=look)
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
        Bootstrap(model, mlp()).fit(data(), rounds=0, epochs=1)


def adaptive(scores, **options):
    """Fits on data where the student scores what ``scores`` say."""
    told = iter(scores)
    recipe = AdaptiveKD(mlp(), mlp(), teacher_score=0.9, low=0.2, high=0.8, **options)
    plan = {"eval_loader": data(), "metrics": lambda distiller, loader: {"accuracy": next(told)}, "progress": False}
    recipe.fit(data(), rounds=len(scores), epochs=1, **plan)
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


def test_a_round_is_trained_with_its_weight_and_the_optimizer_goes_on():
    torch.manual_seed(1)
    teacher, student = mlp(), mlp()
    expected = mlp()
    expected.load_state_dict(student.state_dict())
    told = iter([0.5, 0.7, 0.7])
    plan = {"eval_loader": data(), "metrics": lambda distiller, loader: {"accuracy": next(told)}, "progress": False}
    recipe = AdaptiveKD(student, teacher, teacher_score=0.9, low=0.2, high=0.8, schedule="cosine")
    recipe.fit(data(), rounds=3, epochs=1, **plan)
    optimizer = torch.optim.AdamW(expected.parameters(), 1e-3)
    for weight in recipe.kd_weights:
        options = {"temperature": 2.0, "kd_weight": weight, "ce_weight": 1 - weight, "schedule": "cosine"}
        Distiller(expected, teacher, optimizer=optimizer, **options).fit(data(), epochs=1, progress=False)
    assert recipe.kd_weights == pytest.approx([0.8, 0.8, 0.5])
    assert torch.equal(weights_of(student), weights_of(expected))


def test_adaptive_misuse():
    with pytest.raises(ValueError, match=r"0 <= low <= high <= 1, got low=0\.9 and high=0\.1"):
        AdaptiveKD(mlp(), mlp(), teacher_score=0.9, low=0.9, high=0.1)
    with pytest.raises(ValueError, match="no record has 'f2'"):
        adaptive([0.5], monitor="f2")
