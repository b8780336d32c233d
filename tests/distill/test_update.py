"""A step of the optimiser: its gradient, its parameters, its rate."""

import math
import re
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F

from kdfast import Distiller, SoftLabels, kd_loss
from kdfast.distill import freeze, inverse_decay
from kdfast.distill.counting import Counting
from kdfast.distill.fields import Fields
from support.distillers import CLASSES, FEATURES, data, loader, student, teacher

OPTIONS = {"temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.5}


class Recorder(torch.optim.SGD):
    """Keeps every step's gradients."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.seen = []

    def step(self, closure=None):
        self.seen.append([x.grad.clone() for group in self.param_groups for x in group["params"]])
        return super().step(closure)


def linear(out=CLASSES, dtype=torch.double):
    torch.manual_seed(5)
    return nn.Linear(FEATURES, out, dtype=dtype)


def uneven():
    """Batches of other sizes, with other shares of labels that do not count; one counts nothing at all."""
    x, y = data(30)
    y = y.clone()
    y[[0, 1, 2, 4]] = -100
    y[15:20] = -100
    return [(x[a:b].double(), y[a:b]) for a, b in ((0, 5), (5, 15), (15, 20), (20, 30))]


@pytest.mark.parametrize("accumulate", [4, 3, 1])
def test_gradients_of_several_batches_are_those_of_one(accumulate):
    model, guide = linear(), linear()
    guide.weight.data += 1.0
    distiller = Distiller(model, guide, optimizer=Recorder, accumulate=accumulate)
    start = linear()
    distiller.fit(uneven(), epochs=1, progress=False)
    groups = [uneven()[i : i + accumulate] for i in range(0, 4, accumulate)]
    assert len(distiller.optimizer.seen) == len(groups)
    for group, seen in zip(groups, distiller.optimizer.seen, strict=True):
        x, y = (torch.cat(part) for part in zip(*group, strict=True))
        start.zero_grad()
        kd_loss(start(x), guide(x).detach(), y, **OPTIONS).backward()
        for parameter, grad in zip(start.parameters(), seen, strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-12, atol=1e-15)
            parameter.data -= 0.1 * parameter.grad


class PerToken(nn.Module):
    """An embedding and a head: (batch, length, classes)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.head = nn.Embedding(9, 5, dtype=torch.double), nn.Linear(5, 9, dtype=torch.double)

    def forward(self, input_ids, attention_mask):
        return self.head(self.embed(input_ids))


def sequences(labelled):
    generator = torch.Generator().manual_seed(0)
    for batch, length in ((2, 7), (3, 4), (1, 6)):
        ids = torch.randint(0, 9, (batch, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)).long()
        yield {"input_ids": ids, "attention_mask": mask, **({"labels": ids} if labelled else {})}


@pytest.mark.parametrize("labelled", [False, True])
def test_padded_sequences_accumulate_by_their_tokens(labelled):
    model, guide, reference = PerToken(), PerToken(), PerToken()
    guide.embed.weight.data += 1.0
    batches = list(sequences(labelled))
    options = {"shift": True, "kd_weight": 1.0, "ce_weight": 1.0 if labelled else 0.0}
    distiller = Distiller(model, guide, optimizer=Recorder, accumulate=3, **options)
    distiller.fit(batches, epochs=1, progress=False)
    total, count = 0.0, 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask.bool()][None]
            logits = reference(row, None)
            total = total + kd_loss(logits, guide(row, None).detach(), row, reduction="sum", temperature=2.0, **options)
            count += row.numel() - 1
    (total / count).backward()
    for grad, parameter in zip(distiller.optimizer.seen[0], reference.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-14)


def test_the_gradient_is_clipped():
    model = linear()
    distiller = Distiller(model, optimizer=Recorder, clip_norm=0.01)
    distiller.fit(uneven()[:1], epochs=1, progress=False)
    assert math.isclose(math.sqrt(sum(float((g**2).sum()) for g in distiller.optimizer.seen[0])), 0.01, rel_tol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_the_same_student_roughly(dtype):
    losses = {}
    for amp in (None, dtype):
        model = linear(dtype=torch.float32)
        seen = []

        def objective(step, seen=seen):
            seen.append(step.logits.dtype)
            return kd_loss(step.logits, step.teacher, step.labels, **OPTIONS)

        distiller = Distiller(model, teacher(), objective=objective, amp=amp, lr=0.05)
        losses[amp] = distiller.fit(loader(shuffle=False), epochs=3, progress=False)[-1]["loss"]
        assert set(seen) == {torch.float32 if amp is None else amp}
    assert losses[dtype] == pytest.approx(losses[None], rel=0.05)


def test_a_scaler_that_leaves_a_step_out_leaves_the_schedule_too():
    """The first gradients overflow float16's scale of 65,536: nothing moves, and the next step is the first."""
    model = linear(dtype=torch.float32)
    distiller = Distiller(
        model,
        objective=lambda step: 1e34 * F.cross_entropy(step.logits.float(), step.labels),
        amp=torch.float16,
        schedule="cosine",
    )
    before = model.weight.detach().clone()
    (record,) = distiller.fit(loader(batch=48), epochs=1, progress=False)
    assert torch.equal(model.weight, before)
    assert record["lr"] == 1e-3


def test_rates_follow_their_schedule():
    def rates(schedule, **options):
        distiller = Distiller(student(), schedule=schedule, lr=0.5, **options)
        return [record["lr"] for record in distiller.fit(loader(batch=16), epochs=4, progress=False)]

    # 3 steps per epoch; a record has the rate that comes next
    assert rates("constant") == [0.5] * 4
    assert rates(inverse_decay(0.1)) == pytest.approx([0.5 / (1 + 0.1 * epoch) for epoch in (1, 2, 3, 4)])
    assert rates("cosine") == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 12)) for step in (3, 6, 9, 12)])
    assert rates("cosine", accumulate=2) == pytest.approx(
        [0.25 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]
    )
    step_lr = lambda optimizer, steps, epochs: torch.optim.lr_scheduler.StepLR(optimizer, 2 * steps, 0.1)  # noqa: E731
    assert rates(step_lr) == pytest.approx([0.5, 0.05, 0.05, 0.005])


def test_a_plateau_is_told_of_evaluations():
    def make(optimizer, steps, epochs):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5)

    distiller = Distiller(student(), schedule=make, lr=0.4)
    measured = iter([0.5, 0.4, 0.3])
    history = distiller.fit(
        loader(), epochs=3, eval_loader=loader(), metrics=lambda *_: {"accuracy": next(measured)}, progress=False
    )
    assert [record["lr"] for record in history] == [0.4, 0.4, 0.2]
    assert distiller.optimizer.param_groups[0]["lr"] == 0.4  # its own again


def test_schedules_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"one of constant, cosine.*'linear'"):
        Distiller(student(), schedule="linear")
    with pytest.raises(TypeError, match="got float"):
        Distiller(student(), schedule=0.1)
    with pytest.raises(ValueError, match="negative"):
        inverse_decay(-0.1)


def test_frozen_parameters_and_statistics_stay():
    model = student()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    distiller = Distiller(model, teacher(), freeze=["0.*", re.compile(r"^1\.")], lr=0.1)
    assert len(distiller.parameters) == 2
    assert sum(len(group["params"]) for group in distiller.optimizer.param_groups) == 2
    distiller.fit(loader(), epochs=2, progress=False)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"4.weight", "4.bias"}


def test_a_frozen_norm_stays_where_the_student_comes_in_evaluation_mode():
    model = student().eval()
    distiller = Distiller(model, freeze=["1.*"])
    modes = []
    model[3].register_forward_hook(lambda *_: modes.append((model[3].training, model[1].training)))
    distiller.fit(loader(), epochs=1, progress=False)
    assert set(modes) == {(True, False)}
    assert not any(module.training for module in model.modules())


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches none of 0.weight, 0.bias"):
        freeze(student(), ["0.*", "encoder.*"])
    with pytest.raises(TypeError, match="list of patterns"):
        freeze(student(), "0.*")


class WithProjector(nn.Module):
    """An objective that has parameters."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(CLASSES, CLASSES)

    def forward(self, step):
        return F.mse_loss(self.project(step.logits), step.teacher)


def test_an_objective_s_parameters_are_trained_along():
    for optimizer in (None, lambda parameters: torch.optim.SGD(parameters, 0.1)):
        objective = WithProjector()
        before = objective.project.weight.detach().clone()
        Distiller(student(), teacher(), objective=objective, optimizer=optimizer).fit(
            loader(), epochs=1, progress=False
        )
        assert not torch.equal(objective.project.weight, before)


def test_an_optimizer_that_exists_takes_the_objective_s_parameters_and_must_have_the_student_s():
    model, objective = student(), WithProjector()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Distiller(model, teacher(), objective=objective, optimizer=optimizer)
    assert any(x is objective.project.weight for group in optimizer.param_groups for x in group["params"])
    with pytest.raises(ValueError, match="2 trainable parameters"):
        Distiller(model, optimizer=torch.optim.SGD(list(model.parameters())[2:], 0.1))


def test_options_that_do_not_fit_are_refused():
    for options, error, message in (
        ({"objective": 3}, TypeError, "function of a Step, got int"),
        ({"objective": WithProjector(), "temperature": 2.0}, TypeError, "temperature: KD's options"),
        ({"amp": torch.float32}, ValueError, "bfloat16 or torch.float16"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive"),
        ({"temprature": 2.0}, TypeError, "no option temprature"),
    ):
        with pytest.raises(error, match=message):
            Distiller(student(), teacher(), **options)


def test_a_compiled_student_is_the_same_student(monkeypatch):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    losses = []
    for compiled in (False, True):
        distiller = Distiller(linear(dtype=torch.float32), teacher(), compile=compiled)
        history = distiller.fit(loader(shuffle=False), epochs=2, eval_loader=loader(), progress=False)
        losses.append(history[-1]["loss"])
        assert counter.frame_count == compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Flagged(nn.Module):
    """Called with something that is no tensor first."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, scale, x):
        return self.layer(x) * scale


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.head = nn.Embedding(9, 5, dtype=torch.double), nn.Linear(5, 9, dtype=torch.double)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def test_batches_share_by_what_counts_whatever_they_are():
    """Against the gradient of the summed loss over the number of rows."""
    torch.manual_seed(0)
    x, ids = torch.randn(10, FEATURES).double(), [torch.randint(9, (2, length)) for length in (3, 7)]
    shifted = {"shift": True, "kd_weight": 1.0, "ce_weight": 0.0}
    soft = [torch.rand(*rows.shape, 9, dtype=torch.double).softmax(-1) for rows in ids]
    cases = [
        (Flagged, [{"scale": 2, "x": x[:9]}, {"scale": 2, "x": x[9:]}], {"ce_weight": 0.0}, 10),
        (Tokens, [{"input_ids": rows} for rows in ids], shifted, 2 * 2 + 2 * 6),
        (Tokens, [(rows,) for rows in ids], {"ce_weight": 0.0}, 2 * 3 + 2 * 7),
        (Tokens, [{"input_ids": a, "labels": b} for a, b in zip(ids, soft, strict=True)], {"shift": True}, 16),
    ]
    for make, batches, options, count in cases:
        model, reference, guide = make(), make(), make()
        next(guide.parameters()).data += 1.0
        distiller = Distiller(model, guide, optimizer=Recorder, accumulate=2, **options)
        distiller.fit(batches, epochs=1, progress=False)
        summed = Distiller(reference, guide, **options)
        for batch in batches:
            step = summed.forward(batch)
            loss = kd_loss(step.logits, step.teacher, step.labels, reduction="sum", **{**OPTIONS, **options})
            (loss / count).backward()
        for grad, parameter in zip(distiller.optimizer.seen[0], reference.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-14)


def test_a_cache_s_rows_are_counted_as_positions():
    """Of a shifted sequence the last one predicts nothing, and neither does the one before padding."""
    ids = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    cached = SoftLabels.weights(torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1), vocab_size=4)
    batch = ({"input_ids": ids, "attention_mask": mask}, cached)
    rows = Counting(shift=True).rows(batch, Fields(), per_token=True)
    assert rows.tolist() == [[True, True, False], [True, False, False]]


def test_a_resumed_cosine_follows_the_new_number_of_epochs(tmp_path):
    def rates(epochs):
        distiller = Distiller(student(), schedule="cosine", lr=0.5, folder=tmp_path)
        return [record["lr"] for record in distiller.fit(loader(batch=16), epochs=epochs, progress=False)]

    rates(2)
    assert rates(4)[2:] == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 12)) for step in (9, 12)])


def test_a_plateau_needs_something_to_watch():
    make = lambda optimizer, *_: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)  # noqa: E731
    distiller = Distiller(student(), schedule=make)
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs an eval_loader"):
        distiller.fit(loader(), epochs=1, progress=False)
    with pytest.raises(ValueError, match="monitor 'accuracy' is none of epoch"):
        distiller.fit(loader(), epochs=1, eval_loader=loader(), metrics=["f1"], progress=False)
    assert len(distiller.fit(loader(), epochs=2, monitor="loss", progress=False)) == 2


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_of_a_frozen_part_stay_also_where_its_owner_calls_train(affine):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8, affine=affine)
    model = nn.Sequential(nn.Sequential(nn.Linear(FEATURES, 8), norm), nn.Linear(8, CLASSES))
    distiller = Distiller(model, freeze=["0.*"])
    assert not norm.training
    model.train()
    distiller.fit(loader(), epochs=1, progress=False)
    assert torch.equal(norm.running_mean, torch.zeros(8))
    assert norm.training
