"""Packed labels: whatever way they are cut, joined, sent and decoded, they are the labels that the cache holds."""

import multiprocessing
import pickle
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
import kdfast.cache
from kdfast.cache import PackedLabels, View, codecs, pack_spans
from kdfast.cache.codecs.base import Addressable
from kdfast.cache.codecs.topk import TopK
from kdfast.labels import SoftLabels
from support.children import unpack
from support.repack import repack

VOCAB = 11
ENTRY = np.dtype([("id", "<u4"), ("weight", "<f4")])


@codecs.register
class Ragged(Addressable):
    """Rows of any number of (id, weight); a block begins with where its rows end. Its rows are read one by one."""

    name = "ragged"
    kind = "weights"

    def config(self):
        return {}

    def select(self, logits, key):
        p = logits.float().softmax(1)
        kept = p > 0.1
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
        return SoftLabels.weights(kept.nonzero()[:, 1], p[kept], vocab_size=self.vocab_size, offsets=offsets)

    def encode(self, labels):
        entries = np.empty(labels.values.numel(), ENTRY)
        entries["id"], entries["weight"] = labels.ids.numpy(), labels.values.numpy()
        return labels.offsets[1:].numpy().astype("<u4").tobytes() + self.code(entries).tobytes()

    def locate(self, payload, blocks, rows):
        last = blocks[:, 0] + 4 * rows
        words = np.stack([np.where(rows > 0, last - 4, last), last], 1)[..., None] + np.arange(4)
        first, end = payload[words].view("<u4")[..., 0].astype(np.int64).T
        first = np.where(rows > 0, first, 0)
        if (end < first).any() or (4 * blocks[:, 2] + ENTRY.itemsize * end > blocks[:, 1]).any():
            raise ValueError("its rows do not end within it")
        return np.stack([blocks[:, 0] + 4 * blocks[:, 2] + ENTRY.itemsize * first, ENTRY.itemsize * (end - first)], 1)

    def decode(self, data, units, wanted):
        begin, length, _ = units[wanted].T
        counts = length // ENTRY.itemsize
        offsets = np.concatenate([[0], counts.cumsum()])
        places = np.repeat(begin - ENTRY.itemsize * offsets[:-1], counts) + ENTRY.itemsize * np.arange(offsets[-1])
        entries = self.code(data[places[:, None] + np.arange(ENTRY.itemsize)].reshape(-1).view(ENTRY))
        if (entries["id"] >= self.vocab_size).any():
            raise ValueError("an id is outside the vocabulary")
        ids, weights = torch.from_numpy(entries["id"].astype(np.int32)), torch.from_numpy(entries["weight"].copy())
        return SoftLabels.weights(ids, weights, vocab_size=self.vocab_size, offsets=torch.from_numpy(offsets))

    def code(self, entries):
        return entries


@codecs.register
class Learned(Ragged):
    """Its ids are XORed with a model that depends on the first rows: decoding with another model is noticed."""

    name = "learned"
    learn_rows = 4

    def learn(self, labels):
        return bytes([1, int(labels.ids.sum()) % 250])

    def use_model(self, model):
        if len(model) not in (0, 2):
            raise ValueError(f"a model has 2 bytes, got {len(model)}")
        self.model = model

    def code(self, entries):
        entries = entries.copy()
        entries["id"] ^= int.from_bytes(self.model, "big") << 8
        return entries


@codecs.register
class ByBlock(codecs.Codec):
    """Topk, read by whole blocks, with a table that lies beside the shards."""

    name = "by block, with a table"
    kind = "topk"

    def __init__(self, vocab_size, temperatures, *, table=b"the table", **options):
        super().__init__(vocab_size, temperatures)
        self.inner, self.table = TopK(vocab_size, temperatures, **options), table
        self.file = f"table-{blake2b(table, digest_size=4).hexdigest()}.bin"

    def config(self):
        return {**self.inner.config(), "file": self.file}

    @classmethod
    def options(cls, config, read_asset):
        config = dict(config)
        return {"table": read_asset(config.pop("file")), **config}

    def assets(self):
        return {self.file: self.table}

    def select(self, logits, key):
        return self.inner.select(logits, key)

    def encode(self, labels):
        return self.inner.encode(labels)

    def decode(self, data, units, wanted):
        return self.inner.decode(data, units, wanted)


CODECS = {"topk": {"k": 4}, "dense": {}, "by block, with a table": {"k": 4}, "ragged": {}, "learned": {}}
every_codec = pytest.mark.parametrize("codec", CODECS)


def logits(rows, seed):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def write(path, sizes, codec, **options):
    """Record i has ``sizes[i]`` rows; the first half is one writer's, the other half another's."""
    for name, part in (("a", range(len(sizes) // 2)), ("b", range(len(sizes) // 2, len(sizes)))):
        sizes_of = {"block_rows": 4, "shard_bytes": 300}
        with kdfast.cache.Writer(
            path, vocab_size=VOCAB, codec=codec, writer=name, **{**sizes_of, **CODECS.get(codec, {}), **options}
        ) as w:
            for i in part:
                w.add(i, logits(sizes[i], i))
    return kdfast.cache.open(path)


def assert_same(got, want):
    assert repr(got) == repr(want)
    for field in ("values", "ids", "offsets", "tails", "present"):
        ours, theirs = getattr(got, field), getattr(want, field)
        assert ours is theirs is None or torch.equal(ours, theirs), field


SIZES = [0, 1, 3, 1, 2, 7, 1, 1, 5, 1, 4, 2]


@every_codec
def test_unpacking_is_gathering_however_rows_are_cut_and_joined(tmp_path, codec):
    cache = write(tmp_path, SIZES, codec)
    whole = SoftLabels.cat([cache[i] for i in range(12)])
    order = [9, 2, 2, 5, 11, 0, 4]
    packed = cache.pack(order)
    want = SoftLabels.cat([cache[i] for i in order])
    assert_same(cache.gather(order), want)
    assert_same(packed.unpack(), want)
    rows = torch.tensor([5, 0, 0, 11, 3])
    for index in (rows, rows.tolist(), slice(2, 9, 3), 4, torch.arange(len(packed)) % 2 == 0, slice(0, 0)):
        assert_same(packed[index].unpack(), want[index])
        assert packed[index].data is packed.data
    parts = [cache.pack([i])[::2] for i in range(12)]
    joined = PackedLabels.cat(parts)
    assert_same(joined.unpack(), SoftLabels.cat([cache[i][::2] for i in range(12)]))
    assert len(joined) == sum(map(len, parts))
    assert_same(cache.pack(range(12)).to("cpu").unpack(), whole)
    assert len(cache.pack([]).unpack()) == 0


@settings(deadline=None, max_examples=25)
@given(data=st.data(), sizes=st.lists(st.integers(0, 5), min_size=4, max_size=9))
def test_spans_are_slices_of_records(tmp_path_factory, data, sizes):
    cache = write(tmp_path_factory.mktemp("cache"), [*sizes, 1], data.draw(st.sampled_from(list(CODECS))), block_rows=3)
    entries, parts, present = [], [cache[len(sizes)][:0]], []
    for i in data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=8)):
        start, end = sorted(data.draw(st.lists(st.integers(0, sizes[i]), min_size=2, max_size=2)))
        absent = data.draw(st.integers(0, 2))
        entries += [(i, start, end - start), (None, 0, absent)]
        parts += [cache[i][start:end], cache[len(sizes)][[0] * absent]]
        present += [True] * (end - start) + [False] * absent
    want, present = SoftLabels.cat(parts), torch.tensor(present, dtype=torch.bool)
    for got in (cache.gather(entries), cache.gather(cache.index(entries)[:]), cache.pack(entries).unpack()):
        assert len(got) == len(present)
        assert (got.present is None) == bool(present.all())
        assert got.present is None or torch.equal(got.present, present)
        kept = got[present]
        assert torch.equal(kept.values, want[present].values)
        assert kept.offsets is None or torch.equal(kept.offsets, want[present].offsets)


def test_an_index_of_spans_is_indexed_by_position(tmp_path):
    cache = write(tmp_path, SIZES, "ragged")
    entries = [(5, 2, 3), None, 8, (2, 0, 0), (None, 0, 2)]
    index = pickle.loads(pickle.dumps(cache.index(entries)))
    assert len(cache.gather(index)) == 3 + 1 + 5 + 0 + 2
    for positions in (0, [4, 0, 1], slice(1, 3), torch.tensor([3, 2])):
        chosen = np.atleast_1d(np.arange(5)[positions]).tolist()
        assert_same(cache.gather(index[positions]), cache.gather([entries[i] for i in chosen]))


def test_bad_spans_are_named(tmp_path):
    cache = write(tmp_path, SIZES, "ragged")
    for span, message in [
        ((5, 2, 6), "span 2:8 of 5 goes beyond the record's 7 rows"),
        ((5, 8, 0), "span 8:8 of 5 goes beyond the record's 7 rows"),
        ((5, -1, 2), "span -1:1 of 5 must not start or end before its record"),
        ((5, 1, -1), "span 1:0 of 5 must not"),
        ((None, 1, 2), "span 1:3 of None must not"),
        ((5, 1), r"a span is \(key, start, length\), got \(5, 1\)"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            cache.gather([3, span])
    with pytest.raises(KeyError, match="'x' is not in"):
        cache.pack([("x", 0, 1)])


def test_absent_rows_need_one_that_is_there(tmp_path):
    cache = write(tmp_path / "a", SIZES, "dense")
    labels = cache.gather([(None, 0, 3)])
    assert labels.present.tolist() == [False] * 3
    with pytest.raises(kdfast.cache.CacheError, match="holds no row, so that none can be absent"):
        write(tmp_path / "b", [0, 0], "dense").gather([None])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 25), max_size=20),
    row_length=st.integers(1, 12),
    seam=st.integers(0, 2),
    split=st.booleans(),
)
def test_packing_puts_every_token_into_one_place(lengths, row_length, seam, split):
    rows = pack_spans(lengths, row_length, seam=seam, split=split)
    assert all(sum(length for *_, length in row) == row_length for row in rows)
    got = [(d, t) for row in rows for d, start, length in row if d is not None for t in range(start, start + length)]
    want = [(d, t) for d, length in enumerate(lengths) for t in range(max(0, length - seam))]
    assert sorted(got) == want
    if split:
        assert got == want
        assert len(rows) == -(-sum(lengths) // row_length)
    else:  # a document that fits into a row is whole, seam and all
        for row in rows:
            for document, start, length in row:
                if document is not None and lengths[document] <= row_length:
                    assert (start, length) == (0, max(0, lengths[document] - seam))


def test_packing_fills_rows_well():
    lengths = [7, 3, 5, 5, 9, 1, 4, 6]
    assert len(pack_spans(lengths, 10)) == 4
    with pytest.raises(ValueError, match="row_length 0"):
        pack_spans(lengths, 0)


# ---- a loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["topk", "dense", "ragged"])
def test_a_loss_takes_packed_labels_and_leaves_absent_rows_out(tmp_path, codec):
    cache = write(tmp_path, SIZES, codec)
    entries = [(5, 2, 3), (None, 0, 2), 8]
    packed, whole = cache.pack(entries), cache.pack([(5, 2, 3), 8])
    student = logits(len(packed), 99)
    options = {"divergence": "soft_ce"} if codec == "ragged" else {}
    want = kdfast.kd_loss(student[[0, 1, 2, 5, 6, 7, 8, 9]], whole.unpack(), **options)
    torch.testing.assert_close(kdfast.kd_loss(student, packed, **options), want)
    torch.testing.assert_close(kdfast.KDLoss(**options)(student, packed), want)


# ---- models and assets ------------------------------------------------------------------------------------------


def test_labels_of_two_models_are_decoded_each_with_its_own(tmp_path):
    cache = write(tmp_path / "a", SIZES, "learned")
    assert len({shard.model for shard in cache._shards}) == 2
    packed = cache.pack([8, 1, 9, 2])
    assert len(packed.decoders) == 2
    plain = write(tmp_path / "b", SIZES, "ragged")
    assert_same(packed.unpack(), plain.gather([8, 1, 9, 2]))
    assert_same(PackedLabels.cat([packed, cache.pack([2])]).unpack(), plain.gather([8, 1, 9, 2, 2]))


def test_packed_labels_are_sent_without_the_codec_s_tables(tmp_path):
    cache = write(tmp_path, SIZES, "by block, with a table", table=bytes(100_000))
    packed = cache.pack([5, 1])
    data = pickle.dumps(packed)
    assert len(data) < 5_000
    assert pickle.loads(data).codec is packed.codec
    del cache
    want = packed.unpack()
    del packed
    assert_same(pickle.loads(data).unpack(), want)  # found again through the shard


def test_packed_labels_are_decoded_in_another_process(tmp_path):
    cache = write(tmp_path, SIZES, "topk")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=unpack, args=(pickle.dumps(cache.pack([5, 1])), queue))
    process.start()
    values = queue.get(timeout=300)
    process.join()
    assert np.array_equal(values, cache.gather([5, 1]).values.numpy())


def test_a_missing_asset_is_named(tmp_path):
    write(tmp_path, SIZES, "by block, with a table")
    (asset,) = tmp_path.glob("table-*")
    asset.unlink()
    with pytest.raises(
        kdfast.cache.CacheError, match=f"{asset.name}: is missing, and shard-a-00000.safetensors cannot"
    ):
        kdfast.cache.open(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"xyz", "its codec_model cannot be used: a model has 2 bytes, got 3"),
        (b"", "codec 'learned' needs a model, and the shard holds none"),
    ],
)
def test_a_missing_or_foreign_model_is_named(tmp_path, model, message):
    write(tmp_path, SIZES, "learned")
    repack(tmp_path / "shard-a-00000.safetensors", codec_model=np.frombuffer(model, np.uint8))
    with pytest.raises(kdfast.cache.CacheCorruptError, match=rf"shard-a-00000.safetensors: {message}"):
        kdfast.cache.open(tmp_path)


@codecs.register
class Lying(Ragged):
    """Its first row claims to end far beyond its block."""

    name = "lying"

    def encode(self, labels):
        return b"\xff" * 4 + super().encode(labels)[4:]


def test_a_row_index_that_lies_is_named_by_its_block(tmp_path):
    cache = write(tmp_path, [1] * 16, "lying")
    with pytest.raises(
        kdfast.cache.CacheCorruptError, match=r"shard-b-0000.\.safetensors: block \d: its rows do not end"
    ):
        cache.pack(range(8, 16))


# ---- what goes with the labels ----------------------------------------------------------------------------------


def test_a_shifted_corpus_is_refused(tmp_path):
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCAB, (n,), generator=rng) for n in (4, 0, 6, 2)]
    for targets in ids[::2]:
        targets[0] = -100
    shards = {"vocab_size": VOCAB, "codec": "topk", "k": 2, "shard_bytes": 1, "block_rows": 1}
    with kdfast.cache.Writer(tmp_path / "a", **shards) as w:
        for i, targets in enumerate(ids):
            w.add(f"doc {i}", logits(len(targets), i), targets=targets)
    cache = kdfast.cache.open(tmp_path / "a")
    names = [f"doc {i}" for i in range(4)]
    cache.check_targets(names, ids)
    cache.check_targets(names[::-1], [targets.int().tolist() for targets in ids[::-1]])
    shifted = [targets.roll(1) for targets in ids]
    with pytest.raises(kdfast.cache.CacheMismatchError, match=r"^the targets of 'doc 2' are not those that .*shard-0-"):
        cache.check_targets(names[1:], [ids[1], *shifted[2:]])
    with pytest.raises(ValueError, match="4 keys need as many targets, got 3"):
        cache.check_targets(names, ids[1:])
    losses = [torch.nn.functional.cross_entropy(logits(len(t), i), t, reduction="none") for i, t in enumerate(ids)]
    counts = [int((t >= 0).sum()) for t in ids]
    means = [float(loss.sum()) / n if n else None for loss, n in zip(losses, counts, strict=True)]
    assert cache.info.cross_entropy == pytest.approx(float(torch.cat(losses).sum()) / sum(counts))
    got = [x for x in cache.info.shard_cross_entropy if x is not None]
    assert got == pytest.approx([x for x in means if x is not None])
    plain = write(tmp_path / "b", SIZES, "topk")
    assert plain.info.cross_entropy is None
    with pytest.raises(kdfast.cache.CacheError, match="was written without targets"):
        plain.check_targets([3], [[1]])


def test_views_come_back(tmp_path):
    views = [View(flip=True, seed=7), View(crop=(0.0, 0.5, 1.0, 0.25)), View()]
    with kdfast.cache.Writer(tmp_path / "a", vocab_size=VOCAB, codec="dense") as w:
        w.add("first", logits(1, 0), views=views[2:])
        w.add("sample", logits(3, 0), views=views)
    assert kdfast.cache.open(tmp_path / "a").views("sample") == views
    with pytest.raises(kdfast.cache.CacheError, match="was written without views"):
        write(tmp_path / "b", SIZES, "dense").views(3)
