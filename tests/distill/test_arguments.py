"""Arguments that do not fit are refused with the line that is wanted; a student may be moved at any time."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdfast
from kdfast import Distiller
from kdfast.distill import evaluate
from support.distillers import CLASSES, FEATURES, data, loader, student, teacher


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            TypeError,
            r"optimizer must be a function.*partial\(torch.optim.Adam, lr=0.001\).*'adam'",
            {"optimizer": "adam"},
        ),
        (
            ValueError,
            r"lr=0.1 is of AdamW.*partial\(torch.optim.SGD, lr=0.1\)",
            {"optimizer": torch.optim.SGD, "lr": 0.1},
        ),
        (ValueError, r'device must be "cpu", "cuda" \(a GPU\).*got \'gpu\'', {"device": "gpu"}),
        (TypeError, r"device must be a torch.device or its name.*got float", {"device": 1.0}),
    ],
)
def test_an_option_that_does_not_fit(error, message, options):
    with pytest.raises(error, match=message):
        Distiller(student(), teacher(), **options)


def test_the_learning_rate_of_ones_own_optimizer_is_its_own():
    distiller = Distiller(student(), optimizer=partial(torch.optim.SGD, lr=0.25))
    assert distiller.optimizer.param_groups[0]["lr"] == 0.25


x, y = data(8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((x, y), r"got inputs and labels: torch.utils.data.DataLoader\(TensorDataset\(x, y\)"),
        ([x.numpy(), y.numpy()], r"got inputs and labels.*\[\(x, y\)\] for a single batch"),
        (x, r"got one array: torch.utils.data.DataLoader\(TensorDataset\(x\)"),
        (TensorDataset(x, y), r"got a TensorDataset: torch.utils.data.DataLoader\(dataset, batch_size=64"),
        (3, r"iterable of batches, such as a DataLoader, got int"),
    ],
)
def test_data_are_no_batches(given, message):
    distiller = Distiller(student(), teacher())
    with pytest.raises(TypeError, match="fit .*" + message):
        distiller.fit(given, epochs=1)
    with pytest.raises(TypeError, match="eval_loader .*" + message):
        distiller.fit([(x, y)], epochs=1, eval_loader=given)
    with pytest.raises(TypeError, match="evaluate .*" + message):
        evaluate(distiller, given)


def test_two_batches_of_inputs_are_batches():
    assert len(Distiller(student(), teacher(), kd_weight=1.0, ce_weight=0.0).fit((x, x), epochs=1)) == 1


def test_evaluate_takes_a_distiller():
    with pytest.raises(
        TypeError, match=r"takes a Distiller, got a Sequential: evaluate\(Distiller\(student\), loader\)"
    ):
        evaluate(student(), loader())


def test_fields_that_a_model_does_not_take_are_named():
    batch = {"x": torch.randn(6, FEATURES), "y": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(TypeError, match=r"keyword argument 'x'; a batch that is a mapping .*inputs=\(lambda batch"):
        Distiller(student(), teacher()).step(batch)
    parts = {"inputs": lambda batch: batch["x"], "labels": lambda batch: batch["y"]}
    assert Distiller(student(), teacher(), **parts).step(batch).isfinite()


def test_arrays_of_numpy_are_named():
    with pytest.raises(TypeError, match=r"inputs are NumPy arrays.*torch.from_numpy\(x\).float\(\), or a DataLoader"):
        Distiller(student(), teacher()).fit([(x.numpy(), y)], epochs=1)
    with pytest.raises(TypeError, match=r"labels must be a tensor, got ndarray: torch.from_numpy makes one"):
        Distiller(student(), teacher()).fit([(x, y.numpy())], epochs=1)
    both = DataLoader(list(zip(x.numpy(), y.numpy(), strict=True)), 4)
    assert len(Distiller(student(), teacher()).fit(both, epochs=1)) == 1

    class Broken(nn.Linear):
        def forward(self, x):
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        Distiller(Broken(FEATURES, CLASSES)).fit([(x, y)], epochs=1)


def test_the_temperature_of_a_cache_is_named(tmp_path):
    with kdfast.cache.Writer(tmp_path, vocab_size=CLASSES, codec="topk", k=2, temperatures=(1.0,)) as writer:
        for number, row in enumerate(torch.randn(8, CLASSES)):
            writer.add(f"{number}", row[None])
    cache = kdfast.cache.open(tmp_path)
    key = lambda batch: [f"{number}" for number in range(8)]  # noqa: E731
    wanted = (
        r"hold teacher_temperature \(1.0,\), got 2.0: give the objective temperature=1.0, or .*temperatures=\(2.0,\)"
    )
    with pytest.raises(ValueError, match=wanted):
        Distiller(student(), cache, key=key).fit([(x, y)], epochs=1)
    assert len(Distiller(student(), cache, key=key, temperature=1.0).fit([(x, y)], epochs=1)) == 1


def test_a_student_that_is_moved_later_takes_its_batches_and_teacher_with_it():
    model, near, objective = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES), nn.Linear(1, 1)
    distiller = Distiller(model, near, objective=objective)
    assert distiller.device == torch.device("cpu")
    model.to("meta")
    step = distiller.forward((x, y))
    assert {step.student.device.type, step.teacher.device.type, step.labels.device.type} == {"meta"}
    assert next(objective.parameters()).device.type == next(near.parameters()).device.type == "meta"
    assert distiller.device == torch.device("meta")


def test_a_teacher_that_was_elsewhere_stays_there():
    model, away = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES, device="meta")
    distiller = Distiller(model, away)
    distiller._follow()
    assert next(away.parameters()).device.type == "meta"
    assert distiller.device == torch.device("cpu")
