"""Bytes that no writer makes: a decoder refuses them, whatever their checksums say."""

import math
import shutil

import numpy as np
import pytest
import torch

import kdfast.cache
from kdfast import SoftLabels
from kdfast.cache import codecs
from kdfast.cache.selection.prototypes import PrototypeTable
from kdfast.labels import Hidden
from plain_decoder import decode_entry_block, decode_row, read_tables
from support import ROOT
from support.repack import forge

VOCAB = 9


def make_logits(rows=3, vocab=VOCAB, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def prototypes():
    return PrototypeTable.of(make_logits(2).softmax(1), make_logits(2).softmax(1))


def create(name, temperatures=(1.0,), **options):
    return codecs.create(name, VOCAB, temperatures, options)


def decode(codec, block, rows):
    data = np.frombuffer(block, np.uint8)
    units = np.array([[0, len(data), rows]])
    if isinstance(codec, codecs.base.Addressable) and codec.addressable:
        codec.check_index(data, rows)
        spans = codec.locate(data, units.repeat(rows, 0), np.arange(rows))
        units = np.concatenate([spans, np.ones((rows, 1), np.int64)], 1)
    return codec.decode(data, units, np.arange(rows))


# ---- rows of fixed width --------------------------------------------------------------------------------------------


def row(codec, **fields):
    packed = np.zeros(1, codec.row_dtype)
    for name, value in fields.items():
        packed[name] = value
    return packed.tobytes()


EIGHT = [0, 254, 255, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 0.1, "codes": EIGHT}, None),
        ({"step": 0.1, "codes": [1, *EIGHT[1:]]}, "none of code 0"),
        ({"step": 0.1, "codes": [0, 253, 255, 3, 4, 5, 6, 7, 8]}, "none of its codes is 254"),
        ({"step": 0.0, "codes": EIGHT}, "step is 0, but not all"),
        ({"step": 0.0, "codes": [0, 255] + 7 * [0]}, None),
        ({"step": math.inf, "codes": EIGHT}, "step is outside"),
        ({"step": math.nan, "codes": EIGHT}, "step is outside"),
        ({"step": 0.6, "codes": EIGHT}, "step is outside"),
        ({"step": 0.1, "codes": 9 * [255]}, "no finite column"),
    ],
)
def test_dense(fields, message):
    check(create("dense"), fields, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 1.0, "codes": [0xE0, 0, 0, 0, 0]}, None),
        ({"step": 1.0, "codes": [0xE1, 1 << 4 | 1, 0x11, 0x11, 1]}, "none of code 0"),
        ({"step": 1.0, "codes": [0xD0, 0, 0, 0, 0]}, "none of its codes is 14"),
        ({"step": 1.0, "codes": [0xE0, 0, 0, 0, 0x10]}, "half byte"),
    ],
)
def test_dense_in_four_bits(fields, message):
    check(create("dense", bits=4), fields, message)


def check(codec, fields, message):
    if message is None:
        labels = decode(codec, row(codec, **fields), 1)
        assert not labels.values.isnan().any()
        return
    with pytest.raises(ValueError, match=message):
        decode(codec, row(codec, **fields), 1)


@pytest.mark.parametrize("error", [math.inf, math.nan, 1e31, 0.0, -1.0])
def test_dense_takes_no_error_that_makes_nan(error):
    with pytest.raises(ValueError, match=r"max_error must be positive, got .* at most 1e"):
        create("dense", max_error=error)


TOP = {"ids": [4, 2, 8], "values": [-1.0, -2.0, -2.0], "tails": [-1.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"values": [-1.0, -2.0, -math.inf], "ids": [4, 2, 0]}, None),
        ({"ids": [4, 4, 8]}, "two of them have one id"),
        ({"ids": [4, 2, 4]}, "two of them have one id"),
        ({"ids": [4, 2, 9]}, "outside the vocabulary"),
        ({"values": [-2.0, -1.0, -3.0]}, "the largest first"),
        ({"values": [-1.0, -math.inf, -2.0], "ids": [4, 0, 8]}, "the largest first"),
        ({"values": [-1.0, -2.0, -math.inf]}, "in order"),  # its id is not 0
        ({"values": [-1.0, math.nan, -2.0]}, r"not in \[-inf, 0\]"),
        ({"values": [1.0, -1.0, -2.0]}, r"not in \[-inf, 0\]"),
        ({"tails": [math.nan]}, r"not in \[-inf, 0\]"),
        ({"ids": 0, "values": -math.inf, "tails": -math.inf}, "no probability anywhere"),
    ],
)
def test_topk(change, message):
    check(create("topk", k=3), {**TOP, **change}, message)


def test_many_entries_are_compared_too():
    codec = codecs.create("topk", 70_000, (1.0,), {"k": 40})
    fields = {"values": -np.arange(1.0, 41), "tails": -1.0}
    for step in (1000, 1024):  # multiples of 1024 share the places of a table of 4096
        ids = np.arange(0, 40 * step, step, dtype="<u4")
        for last, message in ((39 * step, None), (step, "one id")):
            ids[39] = last
            check(codec, {**fields, "ids": ids[:, None].view(np.uint8)[:, :3]}, message)


def test_labels_from_elsewhere_are_stored_largest_first(tmp_path):
    labels = SoftLabels.topk(
        torch.tensor([[4, 2, 8], [1, 0, 3]]),
        torch.tensor([[-2.0, -1.0, -3.0], [-1.0, -2.0, -3.0]]),
        torch.tensor([-2.0, -2.0]),
        vocab_size=VOCAB,
    )
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="topk", k=3) as writer:
        writer.add_labels("a", labels)
    back = kdfast.cache.open(tmp_path)["a"]
    assert back.ids.tolist() == [2, 4, 8, 1, 0, 3]
    assert back.values.tolist() == [-1.0, -2.0, -3.0, -1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    ("step", "values", "message"),
    [
        (1.0, [127, 0, -3], None),
        (1.0, [-127, 0, -3], None),
        (0.0, [0, 0, 0], None),
        (1.0, [126, 0, 0], "largest code is not 127"),
        (0.0, [127, 0, 0], "largest code is not 127"),
        (1e-39, [127, 0, 0], "largest code is not 127"),
        (1.0, [-128, 0, 0], "code is -128"),
        (math.inf, [127, 0, 0], "step is negative, infinite or NaN"),
        (-1.0, [127, 0, 0], "step is negative, infinite or NaN"),
    ],
)
def test_hidden(step, values, message):
    codec = create("hidden", width=3, head="0" * 32, bits=8)
    bits = torch.tensor([step]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    check(codec, {"step": bits, "values": values}, message)


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_single_row_of_any_width_is_read(tmp_path, width, bits):
    states = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    options = {"vocab_size": VOCAB, "codec": "hidden", "width": width, "head": "0" * 32, "bits": bits}
    with kdfast.cache.Writer(tmp_path, **options) as writer:
        writer.add("a", states)
    cache = kdfast.cache.open(tmp_path)
    for at in range(5):
        one = cache.gather([("a", at, 1)]).values.float()
        torch.testing.assert_close(one, states[at : at + 1], rtol=0.01, atol=float(states.abs().max()) / 127)
        assert torch.equal(one, cache["a"].values[at : at + 1].float())


@pytest.mark.parametrize("vocab", [2, 3, 5, 9])
@pytest.mark.parametrize(
    ("codec", "options"),
    [("topk", {"k": 3, "temperatures": (1.0, 2.0, 3.0)}), ("topk", {"k": 1, "value_dtype": "float32"}), ("hard", {})]
    + [("dense", {"bits": bits}) for bits in (4, 8)]
    + [(name, {"coding": coding}) for name in ("sample", "threshold") for coding in ("blocks", "rows")],
)
def test_single_rows_of_odd_sizes_are_those_of_the_record(tmp_path, codec, options, vocab):
    with kdfast.cache.Writer(tmp_path, vocab_size=vocab, codec=codec, **options) as writer:
        writer.add("a", make_logits(4, vocab))
    cache = kdfast.cache.open(tmp_path)
    whole = cache["a"]
    for at in range(4):
        ours, theirs = cache.gather([("a", at, 1)]), whole[at : at + 1]
        for field in ("values", "ids", "tails"):
            a, b = getattr(ours, field), getattr(theirs, field)
            assert a is b is None or torch.equal(a, b)


# ---- rows of entries ------------------------------------------------------------------------------------------------


def block_of(codec, headers, ranks, values):
    """The block of such numbers, encoded as they are."""
    numbers = [np.array(x, np.int32) for x in (headers, ranks, values)]
    if codec.coding == "blocks":
        return codec._model.encode(*numbers)
    return codec._layout.encode(*numbers)


def learned(codec):
    if codec.learn_rows:
        codec.use_model(codec.learn(codec.select(make_logits(200), bytes(16))))
    return codec


@pytest.mark.parametrize("coding", ["rows", "plain"])
def test_weights_of_a_sample_add_up_to_one(coding):
    codec = learned(create("sample", draws=4, coding=coding))
    for values, good in (([0, 2], True), ([0, 1], False), ([0, 3], False), ([3, 3], False)):
        block = block_of(codec, [[2]], [1, 3], values)
        if good:
            assert decode(codec, block, 1).values.tolist() == [0.25, 0.75]
        else:
            with pytest.raises(ValueError, match="do not add up to the total"):
                decode(codec, block, 1)


@pytest.mark.parametrize("coding", ["blocks", "rows", "plain"])
@pytest.mark.parametrize(
    ("header", "ranks", "values", "good"),
    [
        ([2, 0, 3], [1, 3], [5, 0], True),
        ([2, 0, 3], [1, 3], [5, 1], False),  # the last entry takes what is left
        ([0, 1, 48], [], [], True),
        ([0, 1, 3], [], [], False),  # no entry, and a part of the mass in them
        ([0, 1, 49], [], [], False),  # no entry, and no tail either
    ],
)
def test_numbers_of_a_prototype_row_go_together(coding, header, ranks, values, good):
    codec = learned(create("prototype", prototypes=prototypes(), coding=coding))
    block = block_of(codec, [header], ranks, values)
    if good:
        labels = decode(codec, block, 1)
        assert float(labels.values.sum() + labels.tails[0].exp()) == pytest.approx(1)
    else:
        with pytest.raises(ValueError, match="do not go together"):
            decode(codec, block, 1)


@pytest.mark.parametrize("coding", ["blocks", "rows", "plain"])
def test_what_fills_a_last_byte_is_zeros(coding):
    codec = learned(create("threshold", tau=0.3, coding=coding))
    labels = codec.select(make_logits(1), bytes(16))
    block = codec.encode(labels)
    used = 0
    for bit in range(8):
        bad = bytearray(block)
        bad[-1] ^= 1 << bit
        try:
            found = decode(codec, bytes(bad), 1)
        except ValueError:
            continue
        used += 1
        assert not torch.equal(found.ids, labels.ids) or not torch.equal(found.values, labels.values)
    assert used < 8


def test_an_index_of_rows_is_an_encoders():
    codec = learned(create("threshold", tau=0.3, coding="rows"))
    block = codec.encode(codec.select(make_logits(3), bytes(16)))
    assert len(decode(codec, block, 3)) == 3
    ends = np.frombuffer(block, "<u2", 3, 1)
    wide = bytes([4]) + ends.astype("<u4").tobytes() + block[7:]
    swapped = block[:1] + ends[[1, 0, 2]].tobytes() + block[7:]
    for bad, message in (
        (block + b"\0", "do not follow one another"),
        (swapped, "do not follow one another"),
        (wide, "another width"),
        (block[:5], "cut short"),
        (b"", "no index"),
        (b"\3" + block[1:], "no index"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.check_index(np.frombuffer(bad, np.uint8), 3)


# ---- through files --------------------------------------------------------------------------------------------------

V1 = ROOT / "tests" / "fixtures" / "v1"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dense", lambda payload, index: payload.__setitem__(slice(0, 4), np.float32(np.nan).tobytes())),
        ("topk", lambda payload, index: payload.__setitem__(slice(2, 4), payload[0:2])),
        ("hidden-8", lambda payload, index: payload.__setitem__(slice(2, 8), bytes(6))),
        ("sample-rows", lambda payload, index: payload.__setitem__(0, 4)),
        ("sample-blocks", lambda payload, index: payload.__setitem__(-1, payload[-1] ^ 128)),
    ],
)
def test_right_checksums_make_no_wrong_row_right(tmp_path, name, change):
    shutil.copytree(V1 / name, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-0-00000.safetensors"
    forge(shard, lambda payload, index: None)
    cache = kdfast.cache.open(tmp_path / "cache")
    cache.gather(list(range(len(cache))))
    forge(shard, change)
    cache = kdfast.cache.open(tmp_path / "cache")
    with pytest.raises(kdfast.cache.CacheCorruptError, match=r"shard-0-00000\.safetensors: block"):
        cache.gather(list(range(len(cache))))


@pytest.mark.parametrize("draws", [0, 6])
def test_the_plain_decoder_refuses_what_the_extension_refuses(draws):
    kind = {"name": "sample", "draws": draws} if draws else {"name": "threshold", "tau": 0.3}
    for coding in ("blocks", "rows"):
        codec = learned(create(**kind, coding=coding))
        block = codec.encode(codec.select(make_logits(3), bytes(16)))
        tables, _ = read_tables(codec.model, 1 + 576)
        header, rank, value = codec.field_widths
        draw = np.random.default_rng(0)
        accepted = 0
        for _ in range(300):
            bad = bytearray(block)
            bad[draw.integers(len(bad))] ^= 1 << draw.integers(8)
            outcomes = []
            for side in ("extension", "plain"):
                try:
                    if side == "extension":
                        labels = decode(codec, bytes(bad), 3)
                        outcomes.append(labels.counts.tolist())
                    elif coding == "blocks":
                        rows = decode_entry_block(bytes(bad), 3, tables, header_fields=1, total=draws)
                        outcomes.append([len(entries) for entries in rows.entries])
                    else:
                        widths = {"header_bits": header, "value_bits": value, "rank_bits": rank, "classes": True}
                        rows = [decode_row(bytes(bad), 3, at, **widths, total=draws)[1] for at in range(3)]
                        outcomes.append([len(entries) for entries in rows])
                except (ValueError, IndexError):
                    outcomes.append(None)
            accepted += outcomes[0] is not None
            # Limits of the codec are beyond the plain decoder, so that it may accept more.
            assert outcomes[0] is None or outcomes[0] == outcomes[1]
        assert accepted < 290


INF, NAN = float("inf"), float("nan")


def top(values, tails, ids=None):
    ids = [list(range(1, 1 + len(values[0])))] if ids is None else ids
    return SoftLabels.topk(torch.tensor(ids), torch.tensor(values), torch.tensor(tails), vocab_size=10)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (lambda: top([[5.0, -1.5]], [-2.0]), {"codec": "topk", "k": 4}),
        (lambda: top([[NAN, -1.5]], [-2.0]), {"codec": "topk", "k": 4}),
        (lambda: top([[-0.5, -1.5]], [0.5]), {"codec": "topk", "k": 4}),
        (lambda: top([[-0.5, -1.5]], [NAN]), {"codec": "topk", "k": 4}),
        (lambda: top([[-INF, -INF]], [-INF]), {"codec": "topk", "k": 4}),
        (lambda: top([[-1.0, -2.0, -3.0]], [-2.0]), {"codec": "topk", "k": 2}),
        (lambda: top([[-0.5, -1.5]], [-2.0]), {"codec": "hard"}),
        (lambda: top([[-1.0]], [-0.5]), {"codec": "hard"}),
        (lambda: SoftLabels.dense(torch.tensor([[NAN] + [0.0] * 9])), {"codec": "dense"}),
        (lambda: SoftLabels.dense(torch.tensor([[-INF] * 10])), {"codec": "dense", "bits": 4}),
        (lambda: SoftLabels.dense(torch.tensor([[-1e5] + [0.0] * 9])), {"codec": "dense"}),
        (lambda: Hidden(vocab_size=10, values=torch.tensor([[INF, 1.0]])), {"codec": "hidden", "width": 2, "bits": 8}),
        (lambda: Hidden(vocab_size=10, values=torch.tensor([[NAN, 1.0]])), {"codec": "hidden", "width": 2}),
    ],
)
def test_a_writer_takes_no_labels_that_its_reader_refuses(tmp_path, labels, options):
    """They would make every batch with one of them unreadable."""
    options = {"head": "0" * 32, **options} if options["codec"] == "hidden" else options
    with (
        kdfast.cache.Writer(tmp_path, vocab_size=10, **options) as writer,
        pytest.raises(ValueError, match=r"codec .* store"),
    ):
        writer.add_labels(0, labels())


def test_what_rounding_adds_and_half_precision_lacks_is_no_fault(tmp_path):
    with kdfast.cache.Writer(tmp_path, vocab_size=10, codec="topk", k=4) as writer:
        writer.add_labels(0, top([[1e-7, -1e5]], [1e-7]))
        writer.add_labels(1, top([[-0.5, -1.5]], [-2.0]))
    cache = kdfast.cache.open(tmp_path)
    assert cache[0].ids.tolist() == [1]  # exp(-1e5) is nothing
    assert (cache[0].values.item(), cache[0].tails.item()) == (0.0, 0.0)
    assert cache.gather([0, 1]).ids.tolist() == [1, 1, 2]
