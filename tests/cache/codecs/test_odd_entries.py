"""Caches of entries at their limits: records without rows, and labels that other tools have made."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import kdfast.cache
from kdfast import SoftLabels
from kdfast.cache.format.container import read_container
from kdfast.cache.selection.prototypes import PrototypeTable
from support.repack import repack

VOCAB = 50


def make_logits(rows=20, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def make_prototypes(seed=9):
    probs = make_logits(4, seed).softmax(1)
    return PrototypeTable.of(0.99 * probs + 0.01 / VOCAB, probs)


CODINGS = pytest.mark.parametrize("coding", ["blocks", "rows", "plain"])
CODECS = pytest.mark.parametrize(
    ("codec", "options"),
    [("sample", {"draws": 10}), ("threshold", {"tau": 0.25}), ("prototype", {"k": 2, "prototypes": make_prototypes()})],
)


@CODINGS
@CODECS
@pytest.mark.filterwarnings("error")
def test_records_without_rows_alone_in_their_shards(tmp_path, codec, options, coding):
    options = {"vocab_size": VOCAB, "codec": codec, "coding": coding, **options}
    for name, rows in [("empty", [0, 0]), ("full", [3, 0])]:
        with kdfast.cache.Writer(tmp_path, writer=name, **options) as writer:
            for number, count in enumerate(rows):
                writer.add(f"{name}{number}", make_logits(count))
    cache = kdfast.cache.open(tmp_path)
    cache.verify()
    assert [len(cache[key]) for key in ("empty0", "empty1", "full0", "full1")] == [0, 0, 3, 0]
    assert len(cache.gather(["empty0", "full0", "empty1", None])) == 4


# SoftLabels' constructors refuse or mend what they can see, which is not all that a codec may be given.
def weights(ids, values):
    good = SoftLabels.weights(torch.arange(len(ids))[None], torch.ones(1, len(ids)), vocab_size=VOCAB)
    return replace(good, ids=torch.tensor(ids).int(), values=torch.tensor(values))


def prototype(ids, probs, tail, shape, prototypes=None):
    table = (make_prototypes() if prototypes is None else prototypes).table
    ids, probs, tail = torch.tensor([ids]), torch.tensor([probs]), torch.tensor([tail])
    good = SoftLabels.prototype(ids, probs, tail, torch.zeros(1).long(), table, vocab_size=VOCAB)
    return replace(good, prototype_ids=torch.tensor([shape]))


# What a codec refuses only when the block is encoded stops its writer for good; what it takes and then cannot decode,
# or takes as something else, is worse.
@CODINGS
@pytest.mark.parametrize(
    ("codec", "labels", "message"),
    [
        ("sample", weights([1, 2], [0.33, 0.67]), "a weight is not one"),
        ("sample", weights([1, 2], [0.3, 0.3]), "do not add up to the total"),
        ("sample", weights([1, 1], [0.5, 0.5]), "must ascend"),
        ("sample", weights([1, 77], [0.5, 0.5]), r"ids must lie in \[0, 50\), got 1 to 77"),
        ("sample", weights([1, -1], [0.5, 0.5]), r"ids must lie in \[0, 50\), got -1 to 1"),
        ("sample", weights([1, 2], [float("nan"), 0.5]), "it is not finite"),
        ("threshold", weights(list(range(20)), [0.25] * 20), r"numbers of entries must lie in \[0, 6\), got 20"),
        (
            "prototype",
            prototype([1, 2], [0.25, 0.25], -0.6931472, 1, make_prototypes(1)),
            "another table of prototypes",
        ),
        ("prototype", prototype([1, 2], [0.3, 0.21], -0.7, 1), "is not one that this codec gives"),
        ("prototype", prototype([1, 2], [0.3, 0.21], -0.7, 9), r"prototype must lie in \[0, 4\), got 9"),
        ("prototype", prototype([1, 2], [float("nan"), 0.2], -0.7, 0), "it is not finite"),
        ("prototype", prototype([1, 2, 3, 4], [0.2, 0.1, 0.1, 0.1], -0.7, 1), "numbers of entries must lie in"),
    ],
)
def test_labels_that_a_codec_would_change_are_refused_by_name(tmp_path, codec, labels, message, coding):
    options = {
        "sample": {"draws": 10},
        "threshold": {"tau": 0.25},
        "prototype": {"k": 2, "prototypes": make_prototypes()},
    }
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec=codec, coding=coding, **options[codec]) as writer:
        writer.add("before", make_logits())
        with pytest.raises(ValueError, match=f"'odd': .*{message}"):
            writer.add_labels("odd", labels)
        writer.add("after", make_logits())
    cache = kdfast.cache.open(tmp_path)
    assert "odd" not in cache
    assert len(cache.gather(["before", "after"])) == 40


@CODINGS
@CODECS
def test_labels_of_a_cache_can_be_stored_again_to_the_bit(tmp_path, codec, options, coding):
    options = {"vocab_size": VOCAB, "codec": codec, "coding": coding, **options}
    with kdfast.cache.Writer(tmp_path / "a", **options) as writer:
        writer.add("a", make_logits())
    labels = kdfast.cache.open(tmp_path / "a")["a"]
    pieces = [labels[7:], labels[:7], labels[torch.tensor([3, 3, 19])], SoftLabels.cat([labels[:1], labels[5:6]])]
    with kdfast.cache.Writer(tmp_path / "b", **options) as writer:
        for number, piece in enumerate(pieces):
            writer.add_labels(number, piece)
    cache = kdfast.cache.open(tmp_path / "b")
    for number, piece in enumerate(pieces):
        for ours, theirs in zip(parts(cache[number]), parts(piece), strict=True):
            assert torch.equal(ours, theirs)


def test_draws_with_repeats_and_padding_are_stored_without(tmp_path):
    """As a sampler gives them: ids that repeat add up, and an id of weight 0 is none."""
    labels = SoftLabels.weights(
        torch.tensor([[7, 7, 3, 9, 9]]), torch.tensor([[0.25, 0.25, 0.5, 0, 0]]), vocab_size=VOCAB
    )
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="sample", draws=4) as writer:
        writer.add_labels("a", labels)
    stored = kdfast.cache.open(tmp_path)["a"]
    assert dict(zip(stored.ids.tolist(), stored.values.tolist(), strict=True)) == {7: 0.5, 3: 0.5}


def parts(labels):
    rows = np.repeat(np.arange(len(labels)), np.diff(labels.offsets.numpy()))
    order = np.lexsort((labels.ids.numpy(), rows))
    rest = [getattr(labels, name) for name in ("offsets", "tails", "prototype_ids")]
    return [labels.ids[order], labels.values[order], *(part for part in rest if part is not None)]


@CODINGS
@CODECS
def test_blocks_that_claim_more_rows_than_bytes_can_hold_are_refused(tmp_path, codec, options, coding):
    """Else a file of some bytes makes its reader ask for memory without end."""
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec=codec, coding=coding, **options) as writer:
        writer.add("a", make_logits())
    (shard,) = tmp_path.glob("shard-*.safetensors")
    index = read_container(shard).tables["block_index"]
    rows = 10**8
    changed = np.array([[*index[0, :3], rows]])
    repack(shard, block_index=changed, record_spans=np.array([[0, rows]]))
    with pytest.raises(kdfast.cache.CacheCorruptError, match=f"block 0: .* bytes cannot hold {rows} rows"):
        kdfast.cache.open(tmp_path)
