"""The classes of soft labels: what each holds, and labels that were written when SoftLabels was one class."""

import copyreg
import inspect
import json
import pickle
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from kdfast import OutputLayer, SoftLabels
from kdfast.cache.write.unfinished import _labels_from_tensors, _labels_to_tensors
from kdfast.labels import Dense, Hidden, Prototype, Ragged, TopK, Weights, Whole
from kdfast.labels.soft_labels import KINDS

IDS, VALUES = torch.tensor([[4, 1], [0, 6]]), torch.tensor([[0.5, 0.25], [0.25, 0.5]])
TAILS, TABLE = torch.tensor([0.25, 0.25]).log(), torch.rand(3, 7)
HEAD = OutputLayer(torch.randn(7, 5))


def make(kind):
    present = torch.tensor([True, False])
    return {
        "topk": lambda: SoftLabels.topk(IDS, VALUES.log(), TAILS, vocab_size=7, present=present),
        "weights": lambda: SoftLabels.weights(IDS, VALUES, vocab_size=7),
        "prototype": lambda: SoftLabels.prototype(IDS, VALUES, TAILS, torch.tensor([2, 0]), TABLE, vocab_size=7),
        "dense": lambda: SoftLabels.dense(torch.arange(14.0).view(2, 7)),
        "hidden": lambda: SoftLabels.hidden(torch.arange(10.0).view(2, 5), vocab_size=7),
    }[kind]()


CLASSES = {"topk": TopK, "weights": Weights, "prototype": Prototype, "dense": Dense, "hidden": Hidden}


def old_state(labels):
    """The fields of the one class that SoftLabels was, as its pickles and journals named them."""
    names = ("vocab_size", "values", "temperatures", "ids", "offsets", "tails", "present", "width", "head")
    state = {"kind": labels.kind, **{name: getattr(labels, name) for name in names}}
    return {**state, "shape": labels.prototype_ids, "shapes": labels.prototypes}


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    assert repr(ours) == repr(theirs)
    for field in fields(theirs):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


class Old:
    """Pickles as an instance of a class SoftLabels with a state does, under protocol 2 and above."""

    def __init__(self, state):
        self.state = state

    @property
    def __class__(self):  # what the pickler compares with the class that it is to write
        return SoftLabels

    def __reduce__(self):
        return copyreg.__newobj__, (SoftLabels,), self.state


@pytest.mark.parametrize("kind", CLASSES)
def test_each_constructor_makes_its_class(kind):
    labels = make(kind)
    assert type(labels) is CLASSES[kind] is KINDS[kind]
    assert labels.kind == kind
    assert isinstance(labels, Whole if kind in ("dense", "hidden") else Ragged)
    with pytest.raises(FrozenInstanceError):
        labels.vocab_size = 8


@pytest.mark.parametrize("kind", CLASSES)
def test_a_field_of_another_kind_is_none(kind):
    labels = make(kind)
    own = {field.name for field in fields(labels)}
    for other in {field.name for cls in CLASSES.values() for field in fields(cls)} - own:
        assert getattr(labels, other) is None
    with pytest.raises(AttributeError, match=f"'{type(labels).__name__}' object has no attribute 'logits'"):
        _ = labels.logits


@pytest.mark.parametrize("kind", CLASSES)
def test_labels_pickle(kind):
    assert_same(pickle.loads(pickle.dumps(make(kind))), make(kind))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("current", [True, False])
def test_a_pickle_of_the_one_class_has_its_kind(kind, current):
    state = old_state(make(kind))
    if current:  # between the renaming of the prototypes and the classes
        state = {{"shape": "prototype_ids", "shapes": "prototypes"}.get(name, name): x for name, x in state.items()}
    back = pickle.loads(pickle.dumps(Old(state)))
    assert_same(back, make(kind))
    assert len(back[:1]) == 1


@pytest.mark.parametrize("kind", CLASSES)
def test_a_journal_gives_labels_back(kind):
    assert_same(_labels_from_tensors(_labels_to_tensors(make(kind))), make(kind))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_journal_of_the_one_class_is_read(kind):
    state = old_state(make(kind))
    tensors = {f"labels.{name}": x for name, x in state.items() if isinstance(x, torch.Tensor)}
    text = json.dumps({name: x for name, x in state.items() if not isinstance(x, torch.Tensor)}).encode()
    tensors["labels."] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    assert_same(_labels_from_tensors(tensors), make(kind))


def test_prototypes_take_their_former_keywords():
    labels = SoftLabels.prototype(IDS, VALUES, TAILS, shape=torch.tensor([2, 0]), shapes=TABLE, vocab_size=7)
    assert_same(labels, make("prototype"))
    assert list(inspect.signature(SoftLabels.prototype).parameters)[3:5] == ["prototype_ids", "prototypes"]
    with pytest.raises(TypeError, match="prototype_ids"):
        SoftLabels.prototype(IDS, VALUES, TAILS, torch.tensor([2, 0]), TABLE, shape=IDS[0], vocab_size=7)


def test_a_shard_of_the_vocabulary():
    columns = slice(2, 5)
    dense = make("dense").shard(columns)
    assert (dense.vocab_size, dense.values.tolist()) == (3, [[2.0, 3.0, 4.0], [9.0, 10.0, 11.0]])
    hidden = SoftLabels.hidden(torch.randn(2, 5), HEAD)
    torch.testing.assert_close(hidden.shard(columns).to_dense().values, hidden.to_dense().values[:, columns])
    topk = make("topk")
    assert topk.shard(columns) is topk
