"""Sums of objectives: students or tasks at once, with one teacher pass, the gradients of each, and one checkpoint."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast import Distiller
from kdfast.distill import KD, Step
from kdfast.recipes import (
    Adversarial,
    ClassAttention,
    Cohort,
    CohortOutput,
    Combined,
    EachStudent,
    GraphAttention,
    MultiTask,
    MutualLearning,
    TaskOutput,
    discriminator,
)
from support.recipes import CLASSES, Counting, batches, blobs, gradient, make_step, mlp


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_students_share_a_teacher_pass_and_nothing_else():
    data = blobs()
    students, teacher = [mlp(hidden=6), mlp(hidden=9)], Counting(mlp())
    alone = [copy.deepcopy(student) for student in students]
    Distiller(Cohort(*students), teacher, objective=EachStudent(KD())).step(data).backward()
    assert teacher.calls == 1
    for ours, one in zip(students, alone, strict=True):
        Distiller(one, teacher).step(data).backward()
        for a, b in zip(gradients(ours), gradients(one), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_a_cache_is_read_once_for_all_students(tmp_path, monkeypatch):
    inputs, labels = blobs(samples=8)
    teacher = mlp()
    with kdfast.cache.Writer(tmp_path, vocab_size=3, codec="dense", teacher="toy") as writer:
        for key, row in enumerate(teacher(inputs).detach()):
            writer.add(key, row[None])
    cache, asked = kdfast.cache.open(tmp_path), []
    for owner, name in ((type(cache), "pack"), (kdfast.PackedLabels, "unpack")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, plain=plain, name=name: asked.append(name) or plain(*given))
    cohort = Cohort(mlp(), mlp())
    options = {"inputs": lambda batch: batch["x"], "objective": EachStudent([KD(), KD(divergence="jsd")])}
    Distiller(cohort, cache, **options).step({"x": inputs, "labels": labels, "key": range(8)}).backward()
    assert asked == ["pack", "unpack"]
    assert all(parameter.grad.abs().sum() > 0 for parameter in cohort.students[1].parameters())


def test_a_cohorts_logits_are_of_the_averaged_probabilities():
    outputs = tuple(torch.randn(4, 3) for _ in range(3))
    mean = sum(x.softmax(-1) for x in outputs) / 3
    assert torch.allclose(CohortOutput(outputs).logits.exp(), mean, atol=1e-6)


def test_a_cohort_trains_and_is_measured_as_an_ensemble():
    data = batches(*blobs())
    torch.manual_seed(1)
    cohort = Cohort(mlp(), mlp(hidden=5))
    distiller = Distiller(cohort, mlp(), objective=EachStudent(KD(kd_weight=0.0, ce_weight=1.0)), lr=0.05)
    history = distiller.fit(data, epochs=5, eval_loader=data, progress=False)
    assert history[-1]["accuracy"] > 0.9


def test_mutual_learning_is_simultaneous():
    first, second = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    third = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, -100, 3, 0, 1])
    step = Step(CohortOutput((first, second, third)), None, labels)
    ours = gradient(MutualLearning(peer_weight=0.6, temperature=2.0)(step), first, second, third)
    counted = labels != -100
    for mine, peers, grad in zip(
        (first, second, third), ((second, third), (first, third), (first, second)), ours, strict=True
    ):
        expected = F.cross_entropy(mine, labels)
        for peer in peers:
            log_q, log_p = ((x[counted] / 2.0).log_softmax(-1) for x in (mine, peer.detach()))
            expected = expected + 0.3 * 4.0 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        assert torch.allclose(grad, gradient(expected, mine)[0], rtol=1e-9, atol=1e-12)


def test_peers_say_nothing_about_rows_that_their_objective_ignores():
    students = tuple(torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    loss = MutualLearning(KD(ignore_index=0))(Step(CohortOutput(students), None, labels))
    for grad in gradient(loss, *students):
        assert not grad[labels == 0].any()
        assert grad[labels != 0].any(1).all()


def test_students_that_agree_teach_each_other_nothing():
    logits = torch.randn(6, 4, dtype=torch.float64)
    students = logits.clone().requires_grad_(), (logits + 3.0).requires_grad_()
    step = Step(CohortOutput(students), None, torch.zeros(6, dtype=torch.int64))
    no_labels = MutualLearning(lambda step: 0.0 * step.logits.sum())
    for grad in gradient(no_labels(step), *students):
        assert torch.allclose(grad, torch.zeros_like(grad), atol=1e-12)


def test_co_training_has_teachers_besides():
    step = make_step(labels=False)
    other = torch.randn_like(step.student, requires_grad=True)
    own = KD(kd_weight=1.0, ce_weight=0.0)
    cohort = Step(CohortOutput((step.student, other)), step.teacher)
    expected = sum(own(Step(student, step.teacher)) for student in (step.student, other))
    assert torch.allclose(MutualLearning(own, peer_weight=0.0)(cohort), expected)


def test_tasks_are_summed_with_their_weights_and_labels():
    student = {"a": torch.randn(5, 3, requires_grad=True), "b": torch.randn(5, 7, requires_grad=True)}
    teacher = {"a": torch.randn(5, 3), "b": torch.randn(5, 7)}
    labels = {"a": torch.zeros(5, dtype=torch.int64), "b": torch.full((5,), 6)}
    parts = {"a": KD(ce_weight=0.3), "b": KD(divergence="jsd")}
    expected = 2.0 * parts["a"](Step(student["a"], teacher["a"], labels["a"]))
    expected = expected + 0.5 * parts["b"](Step(student["b"], teacher["b"], labels["b"]))
    ours = MultiTask(parts, weights={"a": 2.0, "b": 0.5}, labels=lambda batch: batch["of_task"])
    for outputs in (teacher, (teacher["a"], teacher["b"])):
        assert torch.allclose(ours(Step(TaskOutput(student), outputs, batch={"of_task": labels})), expected)


def test_a_teacher_of_several_tasks_runs_once():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return TaskOutput(a=self.a(x), b=self.b(x))

    student, teacher = Heads(), Counting(Heads())
    soft = KD(kd_weight=1.0, ce_weight=0.0)
    distiller = Distiller(student, teacher, objective=MultiTask({"a": soft, "b": soft}), lr=0.05)
    inputs = blobs()[0]
    before = distiller.step(inputs).item()
    assert teacher.calls == 1
    distiller.fit([inputs], epochs=20, progress=False)
    assert distiller.step(inputs).item() < 0.5 * before


def test_objectives_combine():
    step = make_step()
    ours = Combined(KD(), GraphAttention(), weights=(0.5, 3.0))(step)
    assert torch.allclose(ours, 0.5 * KD()(step) + 3.0 * GraphAttention()(step))
    assert torch.allclose(Combined(KD())(step), KD()(step))
    with pytest.raises(ValueError, match="at least one objective"):
        Combined()
    with pytest.raises(ValueError, match="1 objectives need as many weights, got 2"):
        Combined(KD(), weights=(1.0, 2.0))


@pytest.mark.parametrize("objective", [GraphAttention(), ClassAttention(torch.ones(CLASSES)), Combined(KD())])
def test_a_teacher_that_could_be_trained_is_refused(objective):
    step = make_step()
    step.teacher.requires_grad_()
    with pytest.raises(ValueError, match="teacher requires grad"):
        objective(step)


def critic():
    return Adversarial(discriminator(3, hidden=2))


COMPOSITES = {
    "Combined": lambda: Combined(KD(), critic()),
    "EachStudent, one for all": lambda: EachStudent(critic()),
    "EachStudent, one each": lambda: EachStudent([critic(), critic()]),
    "MutualLearning": lambda: MutualLearning(critic()),
    "MultiTask": lambda: MultiTask({"a": critic(), "b": critic()}),
    "nested": lambda: Combined(critic(), Combined(KD(), critic()), EachStudent([KD(), critic()])),
}


@pytest.mark.parametrize("make", COMPOSITES.values(), ids=COMPOSITES)
def test_a_checkpoint_of_the_old_names_loads(make):
    saved, loaded = make(), make()
    old = {name.replace("submodules.", "modules_among_them."): value for name, value in saved.state_dict().items()}
    kept = dict(old)
    assert any(name.startswith("modules_among_them.") for name in old)
    loaded.load_state_dict(old)
    assert old == kept
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_checkpoint_of_other_objectives_does_not_load():
    old = {"modules_among_them.0.discriminator.0.weight": torch.zeros(2, 3)}
    with pytest.raises(RuntimeError, match=r"Missing key.*submodules\.0\.discriminator\.0\.bias"):
        Combined(critic()).load_state_dict(old)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*submodules\.1\.weight"):
        Combined(KD()).load_state_dict({"modules_among_them.1.weight": torch.zeros(1)})


def test_misuse_of_cohorts():
    model = mlp()
    with pytest.raises(ValueError, match="two students or more, got 1"):
        Cohort(model)
    with pytest.raises(ValueError, match="must not share parameters"):
        Cohort(model, model)
    for objective in (EachStudent(KD()), MutualLearning()):
        with pytest.raises(ValueError, match="needs a Cohort of students, got a Tensor"):
            objective(make_step())
    with pytest.raises(ValueError, match="2 students needs as many objectives, got 1"):
        EachStudent([KD()])(Step(CohortOutput((torch.randn(2, 3), torch.randn(2, 3))), torch.randn(2, 3)))


def test_misuse_of_tasks():
    a = torch.randn(5, 3)
    with pytest.raises(ValueError, match="at least one task"):
        MultiTask({})
    with pytest.raises(ValueError, match="weights must have the tasks a, b, lacks b"):
        MultiTask({"a": KD(), "b": KD()}, weights={"a": 1.0})
    tasks = MultiTask({"a": KD(), "b": KD()})
    with pytest.raises(ValueError, match="output must be a mapping from the tasks a, b, got a Tensor"):
        tasks(Step(a, {"a": a, "b": a}))
    with pytest.raises(ValueError, match="teacher's output must have the tasks a, b, lacks b"):
        tasks(Step({"a": a, "b": a}, {"a": a}))
    with pytest.raises(ValueError, match="2 tasks need as many teachers, or one that knows all, got 3"):
        tasks(Step({"a": a, "b": a}, (a, a, a)))
