"""Epochs, evaluation, early stopping, what is written, and what is refused."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import kdfast.cache
from kdfast import Distiller
from kdfast.distill import plot_curves
from support.distillers import CLASSES, FEATURES, data, loader, states_equal, student, teacher


def fit(distiller, *arguments, **options):
    return distiller.fit(*arguments, **{"epochs": 2, "progress": False, **options})


def test_a_student_learns_what_the_teacher_says():
    torch.manual_seed(3)
    guide, learner = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
    distiller = Distiller(learner, guide, lr=0.05, kd_weight=1.0, ce_weight=0.0)
    history = fit(distiller, loader(), epochs=40, eval_loader=[data(200)], eval_every=10)
    assert [record["epoch"] for record in history] == list(range(1, 41))
    assert history[-1]["step"] == 40 * 6
    assert history[-1]["agreement"] > 0.95
    assert history[-1]["loss"] < 0.05 * history[0]["loss"]


def test_without_labels_there_is_still_a_teacher():
    x, _ = data()
    learner = student()
    history = fit(Distiller(learner, teacher(), ce_weight=0.0), list(x.split(8)), eval_loader=[x])
    assert "agreement" in history[-1]
    assert "accuracy" not in history[-1]


def test_a_record_has_what_a_run_costs():
    (record,) = fit(Distiller(student(), teacher()), loader(), epochs=1)
    assert record["parameters"] == 6 * 8 + 8 + 2 * 8 + 8 * 4 + 4
    assert record["samples_per_second"] == pytest.approx(48 / record["seconds"])
    assert record["peak_memory"] > 1 << 20


def test_it_evaluates_every_so_many_epochs_and_at_none_without_a_loader():
    history = fit(Distiller(student()), loader(), epochs=5, eval_loader=loader(), eval_every=2, metrics=["accuracy"])
    assert ["accuracy" in record for record in history] == [False, True, False, True, False]


def test_every_part_s_own_mode_comes_back_after_an_evaluation():
    model = student()
    model[1].eval()  # a batch norm that its owner has frozen
    before = [module.training for module in model.modules()]
    seen = []
    statistics = model[1].running_mean.clone()
    model.register_forward_hook(lambda *_: seen.append([module.training for module in model.modules()]))
    fit(Distiller(model), loader(batch=48), epochs=3, eval_loader=loader(batch=48))
    assert seen == [before, [False] * 6] * 3
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model[1].running_mean, statistics)


def test_modes_come_back_where_evaluation_fails():
    def fail(distiller, loader):
        assert not distiller.student.training
        raise RuntimeError("broken")

    model = student()
    with pytest.raises(RuntimeError, match="broken"):
        fit(Distiller(model), loader(), eval_loader=loader(), metrics=fail)
    assert all(module.training for module in model.modules())


def test_agreement_needs_a_teacher_that_knows_the_records(tmp_path):
    x, y = data(16)
    with kdfast.cache.Writer(tmp_path, vocab_size=CLASSES, codec="dense", bits=8, teacher="t") as writer:
        for i in range(8):
            writer.add(i, x[i : i + 1, :CLASSES])
    batches = [{"key": list(range(a, a + 8)), "input": x[a : a + 8], "labels": y[a : a + 8]} for a in (0, 8)]
    distiller = Distiller(student(), kdfast.cache.open(tmp_path))
    (record,) = fit(distiller, batches[:1], epochs=1, eval_loader=batches[:1])
    assert "agreement" in record
    for known in (batches[1:], [(x, y)]):
        (record,) = fit(distiller, batches[:1], epochs=1, eval_loader=known)
        assert "agreement" not in record
        assert "accuracy" in record


class Script:
    """Metrics that were decided beforehand, and the weights that they were measured at."""

    def __init__(self, values, name="accuracy"):
        self.values, self.name, self.states = iter(values), name, []

    def __call__(self, distiller, loader):
        self.states.append({name: x.clone() for name, x in distiller.student.state_dict().items()})
        return {self.name: next(self.values)}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", ["accuracy", "cross_entropy", "-rmse"])
def test_it_stops_early_with_the_best_student(tmp_path, stored, name):
    sign = 1 if name == "accuracy" else -1
    script = Script([sign * value for value in (float("nan"), 0.3, 0.5, 0.4, 0.5, 0.9)], name.removeprefix("-"))
    model = student()
    options = {"patience": 2, "monitor": name, "metrics": script, "eval_loader": loader(), "epochs": 9}
    history = fit(Distiller(model, folder=tmp_path if stored else None), loader(), **options)
    assert len(history) == 5
    states_equal(model.state_dict(), script.states[2])
    if stored:  # a run that is over is over
        again = student(7)
        assert repr(fit(Distiller(again, folder=tmp_path), loader(), **options)) == repr(history)
        states_equal(again.state_dict(), script.states[2])


def test_without_patience_the_last_student_stays(tmp_path):
    model, script = student(), Script([0.9, 0.1])
    fit(Distiller(model, folder=tmp_path), loader(), eval_loader=loader(), metrics=script)
    states_equal(model.state_dict(), script.states[1])
    states_equal(torch.load(tmp_path / "best.pt", weights_only=True), script.states[0])


def test_patience_needs_something_to_watch():
    with pytest.raises(ValueError, match="patience needs an eval_loader"):
        fit(Distiller(student()), loader(), patience=1)
    with pytest.raises(ValueError, match="monitor 'f1' is none of epoch"):
        fit(Distiller(student()), loader(), eval_loader=loader(), metrics=["accuracy"], monitor="f1", patience=1)
    assert len(fit(Distiller(student(), lr=0.0), loader(shuffle=False), patience=1, monitor="loss", epochs=50)) < 50


class Breaks(nn.Module):
    """A student whose logits are NaN at one call."""

    def __init__(self, at):
        super().__init__()
        self.layer, self.at, self.calls = nn.Linear(FEATURES, CLASSES), at, 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * (float("nan") if self.calls == self.at else 1.0)


def test_a_loss_that_is_not_finite_stops_before_the_student_breaks(tmp_path):
    model = Breaks(at=10)
    with pytest.raises(
        FloatingPointError, match=r"epoch 2, step 10: the loss is nan; the last checkpoint is .*last.pt"
    ):
        fit(Distiller(model, folder=tmp_path), loader(), checkpoint_every=4)
    assert all(bool(x.isfinite().all()) for x in model.parameters())
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["train_state"]["step"] == 8
    assert bool(saved["student"]["layer.weight"].isfinite().all())
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 2: .*no checkpoint was asked for"):
        fit(Distiller(Breaks(at=2)), loader())


def test_empty_loaders_are_refused():
    for empty in ([], loader(rows=3, drop_last=True)):
        with pytest.raises(ValueError, match="the loader is empty"):
            fit(Distiller(student()), empty)
        with pytest.raises(ValueError, match="evaluation's loader is empty"):
            fit(Distiller(student()), loader(), eval_loader=empty)
    once = iter([data(8)])
    with pytest.raises(ValueError, match=r"empty in epoch 2.*only once"):
        fit(Distiller(student()), once)
    with pytest.raises(ValueError, match="without a length"):
        fit(Distiller(student(), schedule="cosine"), iter([data(8)]))


def test_numbers_that_are_none_are_refused():
    for name in ("epochs", "eval_every", "checkpoint_every", "log_every", "patience"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            fit(Distiller(student()), loader(), **{"eval_loader": loader(), name: 0})


class Softmax(nn.Module):
    def forward(self, x):
        return x[:, :CLASSES].softmax(-1)


def test_the_first_batch_is_looked_at():
    x, y = data(8)
    with pytest.raises(ValueError, match="teacher gives probabilities"):
        Distiller(student(), Softmax()).step((x, y))
    with pytest.raises(ValueError, match="student gives probabilities"):
        Distiller(Softmax(), teacher(), optimizer=lambda _: None).step((x, y))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\) or -100, got 1 to 4"):
        Distiller(student(), teacher()).step((x, y + 1))
    with pytest.raises(TypeError, match="labels must be a tensor, got tuple"):
        Distiller(student(), teacher()).step((x, y.tolist()))


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 11)

    def forward(self, input_ids):
        return self.embed(input_ids)


def test_labels_that_are_shifted_wrongly_are_refused():
    ids = torch.randint(0, 11, (2, 6))
    following = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    with pytest.raises(ValueError, match="needs shift=True"):
        Distiller(Causal(), Causal()).step({"input_ids": ids, "labels": ids})
    with pytest.raises(ValueError, match="already the next tokens"):
        Distiller(Causal(), Causal(), shift=True).step({"input_ids": ids, "labels": following})
    model, guide = Causal(), Causal()
    right = {True: ids, False: following}
    losses = [Distiller(model, guide, shift=k).step({"input_ids": ids, "labels": y}) for k, y in right.items()]
    torch.testing.assert_close(*losses)


def test_the_log_has_steps_and_epochs(tmp_path):
    history = fit(
        Distiller(student(), folder=tmp_path), loader(), log_every=4, eval_loader=loader(), metrics=["accuracy"]
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6, 8, 12, 12]
    assert [line for line in lines if "accuracy" in line] == history
    assert lines[0].keys() == {"step", "epoch", "loss", "lr"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_is_told_where_it_is_installed(tmp_path, monkeypatch):
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def close(self):
            told.append("closed")

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    (record,) = fit(Distiller(student(), folder=tmp_path), loader(), epochs=1, log_every=100)
    assert told[0] == (str(tmp_path / "tensorboard"), 1)
    assert ("loss", record["loss"], 6) in told
    assert told[-1] == "closed"


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(Distiller(student()), loader(), checkpoint_every=1)
    assert not list(tmp_path.iterdir())


def test_a_history_of_nothing_has_no_curves(tmp_path):
    with pytest.raises(ValueError, match="empty history"):
        plot_curves([], tmp_path / "x.png")


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r"kdfast\[demo\]"):
        fit(Distiller(student()), loader(), eval_loader=loader())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"kdfast\[demo\]"):
        plot_curves([{"epoch": 1, "loss": 1.0}], tmp_path / "x.png")


def test_callbacks_see_every_epoch_and_a_step_knows_how_far_it_is():
    records, progress = [], []

    def objective(step):
        progress.append((step.epoch, round(step.progress * 12)))
        return step.logits.square().mean()

    history = fit(Distiller(student(), objective=objective), loader(), on_epoch=records.append)
    assert records == history
    assert progress == [(k // 6, k) for k in range(12)]


def test_a_second_call_trains_on_with_a_schedule_that_begins_anew():
    distiller = Distiller(student(), schedule="cosine", lr=0.25)
    first, second = (fit(distiller, loader()) for _ in range(2))
    assert [record["lr"] for record in first] == [record["lr"] for record in second]
    assert first[0]["lr"] == pytest.approx(0.125)
    assert distiller.optimizer.param_groups[0]["lr"] == 0.25


def test_one_s_own_loop():
    torch.manual_seed(0)
    distiller = Distiller(student(), teacher())
    losses = []
    for _ in range(20):
        loss = distiller.step(data())
        loss.backward()
        distiller.optimizer.step()
        distiller.optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]


def test_gradients_that_were_there_before_do_not_count():
    """Those of a loop of one's own, and of a step whose loss was not finite."""
    start = nn.Linear(FEATURES, CLASSES).state_dict()
    ends = []
    for before in ("nothing", "own", "nan"):
        model = Breaks(at=1 if before == "nan" else 0)
        model.layer.load_state_dict(start)
        distiller = Distiller(model, optimizer=lambda parameters: torch.optim.SGD(parameters, 1.0))
        if before == "own":
            distiller.step(data()).backward()
        if before == "nan":
            with pytest.raises(FloatingPointError):
                fit(distiller, [data()])
            assert all(x.grad is None for x in model.parameters())
        fit(distiller, [data()], epochs=1)
        ends.append(model.layer.weight.detach())
    assert torch.equal(ends[1], ends[0])
    assert torch.equal(ends[2], ends[0])


def test_one_s_own_metrics_may_be_numpy_s_and_tensors(tmp_path):
    measure = lambda *_: {"accuracy": np.float64(0.5), "f1": torch.tensor(0.25)}  # noqa: E731
    for epochs in (1, 2):
        history = fit(
            Distiller(student(), folder=tmp_path), loader(), epochs=epochs, eval_loader=loader(), metrics=measure
        )
    assert [(record["accuracy"], record["f1"]) for record in history] == [(0.5, 0.25)] * 2
    assert all(type(record[name]) is float for record in history for name in ("accuracy", "f1"))


def test_what_an_objective_of_one_s_own_takes_for_labels_need_not_be_classes():
    ages = torch.tensor([31, 45, 22])
    distiller = Distiller(nn.Linear(FEATURES, 1), objective=lambda s: (s.logits[:, 0] - s.labels).square().mean())
    assert distiller.step((data(3)[0], ages)).isfinite()
