"""Keys as users have them: lists of ids, numbers in tensors, columns; and what a key that is not there may mean."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import kdfast.cache
from kdfast import PackedLabels, SoftLabels, kd_loss
from kdfast.cache import CacheDataset, record_keys

VOCAB = 11
IDS = [[3, 4, 5], [6, 7], [8, 9, 1, 1]]


def fill(path, names, sizes, **options):
    with kdfast.cache.Writer(path, vocab_size=VOCAB, codec="topk", k=VOCAB, **options) as writer:
        for key, rows in zip(names, sizes, strict=True):
            writer.add(key, torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)))
    return kdfast.cache.open(path)


@pytest.fixture
def texts(tmp_path):
    return fill(tmp_path / "texts", [torch.tensor(ids) for ids in IDS], map(len, IDS))


@pytest.fixture(params=["hash", "range"])
def numbers(tmp_path, request):
    return fill(tmp_path / "numbers", range(5), [2, 1, 3, 1, 2], keys=request.param)


def test_lists_of_ids_are_keys(texts):
    want = texts[torch.tensor(IDS[0])]
    assert torch.equal(texts[IDS[0]].values, want.values)
    assert torch.equal(texts.gather(IDS[:1]).values, want.values)
    assert IDS[1] in texts
    assert len(texts.gather(IDS)) == 9
    with pytest.raises(TypeError, match="a key is a 1-D integer tensor of ids, a str, bytes or an int, got list"):
        texts.gather([["a"]])


def test_a_column_of_lists_is_a_key_each(texts, numbers):
    dataset = CacheDataset(texts, IDS)
    assert len(dataset.collate([dataset[2], dataset[0]])[1]) == 7
    packed = CacheDataset(numbers, [[0, 1], [4]])  # lists of keys that are numbers
    assert len(packed.collate([packed[0], packed[1]])[1]) == 5


@pytest.mark.parametrize("kind", [torch.tensor, np.array, np.int64])
def test_numbers_in_tensors_are_keys(numbers, kind):
    assert torch.equal(numbers[kind(3)].values, numbers[3].values)
    assert len(numbers.gather(torch.tensor([2, 0]))) == 5
    with pytest.raises(KeyError, match="is not in"):
        numbers[kind(9)]


def test_padding_is_named_where_it_is_what_is_wrong(texts):
    for ids, message in [
        ([3, 4, 5, 0, 0], "it is without its 2 last ids, all 0. Keys are ids"),
        ([0, 0, 0, 6, 7], "it is without its 3 first ids, all 0"),
        ([8, 9, 1, 1, 1, 1], "it is without its 2 last ids, all 1"),
    ]:
        for key in (ids, torch.tensor(ids)):
            with pytest.raises(KeyError, match=message):
                texts.gather([key])
    with pytest.raises(KeyError, match=r"ids \[3, 4\] of shape \(2,\) is not in [^:]*$"):
        texts.gather([torch.tensor([3, 4])])


def test_other_mistakes_with_keys_are_named(texts, numbers):
    with pytest.raises(KeyError, match=r"each number of a tensor is a key.*\[ids\]"):
        texts.gather(torch.tensor(IDS[0]))
    if numbers.info.keys == "range":
        with pytest.raises(KeyError, match="its keys are consecutive integers"):
            numbers["a"]
    (key,) = record_keys({"input_ids": torch.tensor(IDS[:1]), "pixel_values": torch.zeros(1, 2)})
    with pytest.raises(KeyError, match="a record of these ids alone, without all else that the model is given"):
        texts.gather([key])
    for wrong, message in (("ab", r"one str: give \['ab'\]"), (b"ab", "one bytes"), ({"input_ids": 1}, "one dict")):
        for call in (texts.gather, texts.pack, texts.index, lambda keys: CacheDataset(texts, keys)):
            with pytest.raises(TypeError, match=message):
                call(wrong)


def test_counts_and_checksums_of_records(tmp_path):
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="dense") as writer:
        writer.add("a", torch.randn(2, VOCAB), targets=torch.tensor([3, -100]))
        writer.add("b", torch.randn(1, VOCAB), targets=torch.tensor([4]))
    cache = kdfast.cache.open(tmp_path)
    assert cache.row_counts(["b", "x", "a"]).tolist() == [1, -1, 2]
    found = cache.target_checksums(["a", "x", "b"])
    assert found[1] == -1
    assert (found[[0, 2]] >= 0).all()
    assert cache.target_checksums(cache.index(["b", "a"])).tolist() == found[[2, 0]].tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_a_loader_collates_labels(texts, packed):
    pairs = [(len(ids), texts.pack([ids]) if packed else texts[ids]) for ids in IDS]
    ((lengths, labels),) = DataLoader(pairs, batch_size=3)
    assert isinstance(labels, PackedLabels if packed else SoftLabels)
    assert (lengths.tolist(), len(labels)) == ([3, 2, 4], 9)
    labels = labels.unpack() if packed else labels
    assert torch.equal(labels.values, texts.gather(IDS).values)


def test_rows_of_a_padded_batch_are_named(texts):
    logits = torch.randn(3, 4, VOCAB)
    with pytest.raises(ValueError, match=r"9 rows of soft labels.*has 12: .*attention_mask.bool\(\).*mask_spans"):
        kd_loss(logits, texts.gather(IDS))
    with pytest.raises(ValueError, match=r"has 8$"):
        kd_loss(logits.view(12, VOCAB)[:8], texts.gather(IDS))
