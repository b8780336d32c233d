"""Modules, functions and caches as teachers give the same outputs, and are unchanged afterwards."""

import functools
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import kdfast.cache
from kdfast import Distiller, PackedLabels, kd_loss
from kdfast.cache import CacheMismatchError, mask_spans
from kdfast.distill import KD
from kdfast.distill.fields import to_device
from support.distillers import CLASSES, FEATURES, data, student, teacher

VOCAB = 13


def flags(model):
    return [module.training for module in model.modules()]


def test_a_module_runs_in_evaluation_mode_and_is_restored():
    model = teacher()
    model.train()
    model[1].eval()
    before, (x, y) = flags(model), data(16)
    statistics = model[1].running_mean.clone()
    output = Distiller(student(), model).forward((x, y)).teacher
    assert not output.requires_grad
    assert flags(model) == before
    assert torch.equal(model[1].running_mean, statistics)
    assert torch.equal(output, model.eval()(x))


def test_a_module_that_fails_is_restored_too():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    model = Failing()
    with pytest.raises(RuntimeError, match="broken"):
        Distiller(student(), model).forward(data(4))
    assert model.training


def test_several_teachers_are_a_tuple():
    a, b = teacher(2), teacher(3)
    output = Distiller(student(), (a, lambda x: b.eval()(x))).forward(data(8)).teacher
    assert torch.equal(output[0], a.eval()(data(8)[0]))
    assert torch.equal(output[1], b.eval()(data(8)[0]))


def test_an_output_that_requires_grad_is_refused():
    weight = torch.randn(FEATURES, CLASSES, requires_grad=True)

    def sneaky(x):
        with torch.enable_grad():
            return {"logits": x @ weight}

    with pytest.raises(ValueError, match="requires grad"):
        Distiller(student(), sneaky).forward(data(4))


def test_what_is_no_teacher_is_refused():
    model = student()
    with pytest.raises(ValueError, match="the student itself"):
        Distiller(model, model)
    with pytest.raises(TypeError, match=r"CacheReader.*got str"):
        Distiller(model, "labels")
    with pytest.raises(TypeError, match="student must be"):
        Distiller(lambda x: x)


@pytest.fixture
def images(tmp_path):
    """A cache of one row per image, keyed by position, and what it holds."""
    x, y = data(32)
    model = teacher().eval()
    with kdfast.cache.Writer(tmp_path, vocab_size=CLASSES, codec="dense", bits=8, teacher="t") as writer:
        for i, row in enumerate(model(x).detach()):
            writer.add(i, row[None])
    return kdfast.cache.open(tmp_path), x, y


def test_a_cache_is_asked_for_the_keys(images):
    cache, x, y = images
    rows = torch.tensor([5, 2, 30])
    expected = kd_loss(student().eval()(x[rows]), cache.gather([5, 2, 30]), y[rows], **KD().options)
    batches = [
        ({"key": rows, "input": x[rows], "labels": y[rows]}, {}),
        ((x[rows], y[rows], rows), {"key": lambda batch: batch[2].tolist()}),
    ]
    for batch, options in batches:
        distiller = Distiller(student().eval(), cache, **options)
        assert torch.equal(distiller.step(batch), expected)


def test_a_key_that_is_missing_is_named(images):
    cache, x, y = images
    distiller = Distiller(student(), cache, key=lambda batch: batch[2].tolist())
    with pytest.raises(KeyError, match="99 is not in"):
        distiller.step((x[:2], y[:2], torch.tensor([0, 99])))
    with pytest.raises(ValueError, match="key=\\(lambda"):
        Distiller(student(), cache).step((x[:2], y[:2]))


def test_labels_that_come_with_a_batch_are_the_teacher_s(images):
    cache, x, y = images
    pairs = [(x[i], y[i]) for i in range(32)]
    dataset = kdfast.cache.CacheDataset(cache, range(32), pairs)
    batch = next(iter(DataLoader(dataset, 8, collate_fn=dataset.collate)))
    assert isinstance(batch[1], PackedLabels)
    expected = kd_loss(student().eval()(x[:8]), cache.gather(range(8)), y[:8], **KD().options)
    for given in (None, cache):
        assert torch.equal(Distiller(student().eval(), given).step(batch), expected)
    with pytest.raises(ValueError, match="give only one"):
        Distiller(student(), teacher()).step(batch)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.head((self.embed(input_ids) * attention_mask[..., None]).cumsum(1))}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_causal_model_s_cache_gives_the_model_s_loss(tmp_path, side):
    """Row i of a record predicts token i + 1, as row i of the student's logits does."""
    torch.manual_seed(0)
    model, learner = LanguageModel(), LanguageModel()
    documents = [torch.randint(0, VOCAB, (n,)) for n in (5, 3, 1)]
    with kdfast.cache.Writer(
        tmp_path, vocab_size=VOCAB, codec="topk", k=VOCAB, temperatures=(2.0,), teacher="t"
    ) as writer:
        for ids in documents:
            logits = model(ids[None], torch.ones(1, len(ids)))["logits"]
            writer.add(ids, logits[0].detach())
    ids = torch.zeros(3, 6, dtype=torch.long)
    mask = torch.zeros(3, 6, dtype=torch.long)
    for i, document in enumerate(documents):
        where = slice(6 - len(document), 6) if side == "left" else slice(0, len(document))
        ids[i, where], mask[i, where] = document, 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    losses = [Distiller(learner, t, shift=True).step(batch) for t in (model, kdfast.cache.open(tmp_path))]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)  # the cache rounds
    kd = [
        Distiller(learner, t, ce_weight=0.0).step({**batch, "labels": None})
        for t in (model, kdfast.cache.open(tmp_path))
    ]
    torch.testing.assert_close(kd[1], kd[0], rtol=1e-3, atol=1e-4)


def test_a_method_of_a_module_is_in_evaluation_mode_too():
    model, (x, y) = teacher(), data(16)
    statistics = model[1].running_mean.clone()
    output = Distiller(student(), model.forward).forward((x, y)).teacher
    assert torch.equal(model[1].running_mean, statistics)
    assert model.training
    assert torch.equal(output, model.eval()(x))


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


class Output(dict):
    @property
    def logits(self):
        return self["logits"]


def test_batches_and_outputs_stay_what_they_are():
    x, y = data(8)
    distiller = Distiller(student(), teacher(), inputs=lambda batch: batch.image, labels=lambda batch: batch.label)
    assert distiller.step(Pair(x, y)).isfinite()
    given = Output(logits=x, more=[y])
    for moved in (to_device(kind, torch.device("cpu")) for kind in (given, UserDict(given))):
        assert type(moved) in (Output, UserDict)
        assert torch.equal(moved["logits"], x)
        assert isinstance(moved["more"], tuple)
    assert isinstance(given["more"], list)


def test_the_device_is_the_weights():
    model = student()
    assert Distiller(model, device="cpu:0").device == next(model.parameters()).device


# ---- labels and targets --------------------------------------------------------------------------------------------


@pytest.fixture
def shuffled(tmp_path):
    """A capture keyed by position in the loader's order, which was shuffled, and one keyed by what the images are."""
    x, y = data(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for name, keys in (("positions", range(64)), ("names", order.tolist())):
        loader = [(x[order[i : i + 16]], y[order[i : i + 16]], list(keys[i : i + 16])) for i in range(0, 64, 16)]
        kdfast.cache.capture(
            teacher(), loader, tmp_path / name, vocab_size=CLASSES, codec="dense", progress=False,
            key=lambda b: b[2], targets=lambda b: b[1],
        )  # fmt: skip
    return {name: kdfast.cache.open(tmp_path / name) for name in ("positions", "names")}, x, y


def test_labels_are_compared_with_the_targets_of_their_records(shuffled):
    caches, x, y = shuffled
    batch = {"key": torch.arange(32), "input": x[:32], "labels": y[:32]}
    wrong = Distiller(student(), caches["positions"])
    with pytest.raises(CacheMismatchError, match=r"labels of 0 are not the targets .* compare_targets=False"):
        wrong.step(batch)
    assert wrong.forward(batch, strict=False).teacher is None
    right = Distiller(student().eval(), caches["names"]).step(batch)
    torch.testing.assert_close(right, Distiller(student().eval(), teacher().eval()).step(batch), rtol=1e-3, atol=1e-3)
    one = {**batch, "labels": batch["labels"].where(torch.arange(32) != 9, (y[9] + 1) % CLASSES)}
    with pytest.raises(CacheMismatchError, match=r"labels of 9 are not .* with 1 of 32 records"):
        Distiller(student(), caches["names"]).step(one)
    assert Distiller(student(), caches["names"], compare_targets=False).step(one).isfinite()


def test_labels_that_are_none_or_are_mixed_are_not_compared(shuffled):
    caches, x, y = shuffled
    batch = {"key": torch.arange(8), "input": x[:8]}
    few = y[:8].where(torch.arange(8) < 2, -100)  # the others have no label
    mixed = torch.full((8, CLASSES), 1 / CLASSES)
    for labels in (few, mixed):
        assert Distiller(student(), caches["names"]).step({**batch, "labels": labels}).isfinite()
    assert Distiller(student(), caches["names"], ce_weight=0.0).step(batch).isfinite()
    other = few.masked_fill(few < 0, 0)
    other[:2] = few[:2]
    assert Distiller(student(), caches["names"], ignore_index=0).step({**batch, "labels": other}).isfinite()


def test_a_dataset_compares_labels_too(shuffled):
    caches, x, y = shuffled
    pairs = [(x[i], y[i]) for i in range(64)]
    for examples in (pairs, [{"input": x, "labels": y} for x, y in pairs]):
        dataset = kdfast.cache.CacheDataset(caches["positions"], range(64), examples)
        with pytest.raises(CacheMismatchError, match="labels of record 0 of the batch"):
            dataset.collate([dataset[i] for i in range(16)])
        dataset = kdfast.cache.CacheDataset(caches["positions"], range(64), examples, compare_targets=False)
        assert len(dataset.collate([dataset[i] for i in range(16)])[1]) == 16
        dataset = kdfast.cache.CacheDataset(caches["names"], range(64), examples)
        assert len(dataset.collate([dataset[i] for i in range(16)])[1]) == 16


def texts(side, masked=False):
    """Three documents, padded on one side; labels are the ids, those of a prompt of two tokens ignored."""
    generator = torch.Generator().manual_seed(4)
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for i, length in enumerate((5, 3, 6)):
        where = slice(6 - length, 6) if side == "left" else slice(0, length)
        ids[i, where], mask[i, where] = torch.randint(1, VOCAB, (length,), generator=generator), 1
    labels = ids.masked_fill(mask == 0, -100)
    if masked:
        labels = labels.masked_fill(mask.cumsum(1) <= 2, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def next_labels(batch):
    following = batch["labels"].roll(-1, 1)
    following[:, -1] = -100
    return following


CONVENTIONS = {"as they are": lambda b: b["labels"], "the next": next_labels}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("targets", [*CONVENTIONS])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_are_compared_however_they_are_shifted(tmp_path, side, targets, masked):
    batch = {**texts(side), "key": ["a", "b", "c"]}
    capture = functools.partial(
        kdfast.cache.capture, vocab_size=VOCAB, codec="dense", progress=False, targets=CONVENTIONS[targets]
    )
    capture(LanguageModel(), [batch], tmp_path)
    learner = Distiller(LanguageModel(), kdfast.cache.open(tmp_path), shift=True, temperature=1.0)
    student_s = {**batch, "labels": texts(side, masked)["labels"]}
    assert learner.step(student_s).isfinite()
    with pytest.raises(CacheMismatchError, match="labels of 'a' are not the targets"):
        learner.step({**student_s, "key": ["a", "b", "c"], **rolled(student_s)})


def rolled(batch):
    """Other ids of the same lengths under the same keys."""
    ids = torch.where(batch["attention_mask"] > 0, batch["input_ids"] % (VOCAB - 1) + 1, 0)
    return {"input_ids": ids, "labels": torch.where(batch["labels"] >= 0, ids, -100)}


# ---- caches of some rows -------------------------------------------------------------------------------------------


def answers(batch):
    """The rows that predict an answer's tokens: position i predicts token i + 1."""
    return next_labels(batch) >= 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_of_the_supervised_rows_serves_with_the_mask_of_the_capture(tmp_path, side):
    torch.manual_seed(0)
    model, batch = LanguageModel(), texts(side, masked=True)
    kdfast.cache.capture(
        model, [batch], tmp_path, vocab_size=VOCAB, codec="topk", k=VOCAB, value_dtype="float32", progress=False,
        temperatures=(2.0,), mask=answers, targets=next_labels,
    )  # fmt: skip
    cache = kdfast.cache.open(tmp_path)
    assert cache.info.rows == (next_labels(batch) >= 0).sum() < batch["attention_mask"].sum()
    weights = []
    ways = (model, {}), (cache, {"cache_mask": answers}), (cache, {"cache_mask": lambda batch: answers(batch).long()})
    for given, options in ways:
        torch.manual_seed(1)
        learner = LanguageModel()
        Distiller(learner, given, shift=True, **options).step(batch).backward()
        weights.append([x.grad for x in learner.parameters()])
    for cached, integers, live in zip(weights[1], weights[2], weights[0], strict=True):
        torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-6)
        assert torch.equal(cached, integers)
    spans = [
        span
        for ids, real, row in zip(batch["input_ids"], batch["attention_mask"].bool(), answers(batch), strict=True)
        for span in mask_spans(ids[real], row)
    ]
    labels = cache.gather(spans)
    assert torch.equal(labels.present, answers(batch).flatten())
    with pytest.raises(ValueError, match=r"has 3 rows, the batch 5 tokens of it: if it was captured with mask="):
        Distiller(LanguageModel(), cache, shift=True).step(batch)
    with pytest.raises(ValueError, match=r"rows, the batch 5 that cache_mask keeps: the capture's mask was another"):
        Distiller(LanguageModel(), cache, shift=True, cache_mask=lambda b: b["attention_mask"] > 0).step(batch)
    with pytest.raises(ValueError, match=r"cache_mask must be a bool tensor .*torch.float32"):
        Distiller(LanguageModel(), cache, shift=True, cache_mask=lambda b: b["attention_mask"].float()).step(batch)
    with pytest.raises(ValueError, match=r"cache_mask of torch.int64 is a mask of 0 and 1, got values from 0 to 2"):
        Distiller(LanguageModel(), cache, shift=True, cache_mask=lambda b: 2 * b["attention_mask"]).step(batch)
