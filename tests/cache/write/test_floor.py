"""What a cache says of how far its labels lie from the rows that they stand for: of all of it, whatever wrote it."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

import kdfast.cache
from kdfast.cache import CacheCorruptError, codecs
from kdfast.cache.format.floor import FloorSums
from kdfast.cache.tools.merge import merge
from kdfast.cache.write import measure
from kdfast.labels import OutputLayer
from kdfast.labels.distance import distances
from support import ROOT
from support.caches import VOCAB, contents, logits
from support.entry_checks import make_prototypes
from support.repack import repack

HEAD = OutputLayer(torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(7)))
TABLE = make_prototypes(VOCAB)
CODECS = {
    "dense-8": {"codec": "dense"},
    "dense-4": {"codec": "dense", "bits": 4, "temperatures": (2.0,)},
    "topk": {"codec": "topk", "k": 3, "temperatures": (2.0, 1.0)},
    "hard": {"codec": "hard"},
    "prototype": {"codec": "prototype", "prototypes": TABLE},
    "prototype-rows": {"codec": "prototype", "prototypes": TABLE, "coding": "rows", "k": 0},
    "hidden-8": {"codec": "hidden", "width": 6, "head": HEAD, "bits": 8},
}


def writer(path, **options):
    return kdfast.cache.Writer(path, **{"vocab_size": VOCAB, "teacher": "t", **options})


def rows_of(i, codec="dense"):
    torch.manual_seed(100 + i)
    return torch.randn(i % 3 + 1, 6 if codec == "hidden" else VOCAB) * 3


def expected(path, codec, count):
    """Mean and standard error of KL(row || label as it is read), all rows counting alike."""
    cache = kdfast.cache.open(path, head=HEAD if codec == "hidden" else None)
    given = torch.cat([rows_of(i, codec) for i in range(count)])
    given = HEAD.logits(given) if codec == "hidden" else given
    found = distances(given, cache.gather(range(count)), cache.info.temperatures[0])
    return cache.info, found


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_s_floor_is_that_of_the_labels_that_are_read(tmp_path, name):
    with writer(tmp_path, **CODECS[name]) as w:
        for i in range(20):
            w.add(i, rows_of(i, CODECS[name]["codec"]))
        assert w.measured.rows == 39
    info, want = expected(tmp_path, CODECS[name]["codec"], 20)
    floor = info.floor
    assert (floor.rows, floor.temperature) == (39, info.temperatures[0])
    # Numbers are on a grid of 6e-8 nats; of hidden states they are those of a float32 product.
    exact = {"rel": 1e-3 if name == "hidden-8" else 1e-8, "abs": 4e-8}
    assert floor.entropy == pytest.approx(float(want.entropy.mean()), **exact)
    listed = json.loads((tmp_path / "manifest.json").read_text())["floor"]
    if name == "hard":
        assert (floor.kl, listed["kl"], want.kl.min()) == (math.inf, None, math.inf)
        return
    assert floor.kl == pytest.approx(float(want.kl.mean()), **exact)
    assert floor.standard_error == pytest.approx(float(want.kl.std()) / math.sqrt(39), **exact)
    assert floor.left_open == pytest.approx(float(want.left_open.mean()), **exact)
    assert listed == floor._asdict()
    assert info.floor_text == floor.text()
    bounds = {"dense-8": (1e-7, 1e-3), "dense-4": (1e-4, 0.1), "topk": (0, 1e-6), "hidden-8": (1e-7, 1e-2)}
    low, high = bounds.get(name, (0.01, 5))
    assert low <= floor.kl < high
    assert (floor.left_open > 0.01) == (name == "topk")


@pytest.mark.parametrize("options", [{"codec": "sample", "draws": 7}, {"codec": "threshold", "tau": 0.25}])
def test_draws_have_noise_and_no_floor(tmp_path, options):
    with writer(tmp_path, **options) as w:
        w.add("a", logits(5))
        assert w.measured is None
    info = kdfast.cache.open(tmp_path).info
    assert info.floor is None
    assert info.noise in ("the noise of 7 draws a row", "the noise of draws below 0.25")
    assert info.floor_text == f"none: unbiased, with {info.noise}"
    assert "floor" not in json.loads((tmp_path / "manifest.json").read_text())


def test_hidden_states_without_their_layer_are_not_measured(tmp_path):
    with writer(tmp_path, codec="hidden", width=6, head=HEAD.fingerprint) as w:
        w.add(0, rows_of(0, "hidden"))
    info = kdfast.cache.open(tmp_path).info
    assert (info.floor, info.floor_text) == (None, "not measured")


def test_old_caches_are_read_as_before():
    for path in (ROOT / "tests" / "fixtures" / "v1").iterdir():
        cache = kdfast.cache.open(path)
        assert (cache.floor, cache.info.floor, cache.gather(range(1)).floor) == (None, None, None)
        drawn = codecs.find(cache.info.codec).drawn
        assert cache.info.floor_text.startswith("none: unbiased" if drawn else "not measured")


def test_the_labels_bring_their_floor(tmp_path):
    with writer(tmp_path, codec="dense") as w:
        w.add(0, logits(3))
    cache = kdfast.cache.open(tmp_path)
    packed = cache.pack([0])
    assert cache.floor == cache[0].floor == packed.floor == packed[:2].unpack().floor == packed.to("cpu").floor
    assert kdfast.cache.PackedLabels.cat([packed, packed]).floor == cache.floor
    with writer(tmp_path / "copy", codec="dense") as w:
        w.add_labels(0, cache[0])  # without the teacher's rows nothing is measured
    assert kdfast.cache.open(tmp_path / "copy").floor is None


@pytest.mark.parametrize("name", [name for name in CODECS if name != "dense-4"])
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
def test_extreme_rows_leave_sums_that_can_be_read(tmp_path, name, scale):
    """Certain, even and masked rows: an entropy of 0 is not a little less, and nothing is NaN."""
    codec = CODECS[name]["codec"]
    options = {**CODECS[name], "max_error": 1e30} if codec == "dense" else CODECS[name]
    rows = torch.eye(6 if codec == "hidden" else VOCAB)[:5] * scale
    if codec != "hidden":
        rows[0, 3:] = -math.inf
        rows[1, 1:] = -math.inf
        rows[1, 0] = 1.0
    with writer(tmp_path, **options) as w:
        w.add("a", rows)
    floor = kdfast.cache.open(tmp_path, head=HEAD if codec == "hidden" else None).floor
    assert floor.rows == 5
    assert floor.kl >= 0 <= floor.entropy
    assert floor.left_open >= 0 <= floor.standard_error


# ---- which rows -----------------------------------------------------------------------------------------------------


def test_rows_are_measured_all_along_and_ever_fewer():
    chosen = measure.measured_rows(0, 200_000)
    assert chosen[:256].tolist() == list(range(256))
    assert len(chosen) == 256 + math.floor(256 * math.log(200_000 / 256))
    parts, before = [], 0
    for count in [1, 255, 1, 0, 1000, 3, 98_740, 100_000]:
        parts.append(before + measure.measured_rows(before, count))
        before += count
    assert np.concatenate(parts).tolist() == chosen.tolist()
    weights = np.maximum(1.0, (chosen + 1) / 256)
    assert weights.sum() == pytest.approx(200_000, rel=0.01)  # all rows have somebody to stand for them
    for cut in (1_000, 10_000, 100_000):
        assert weights[chosen < cut].sum() == pytest.approx(cut, rel=0.02)
    late = measure.measured_rows(10**9, 10**5)
    assert len(late) == 0 or len(late) == 1


def test_the_mean_is_over_all_rows_though_few_are_measured(tmp_path, monkeypatch):
    """Labels get better along the capture: the first rows alone would say something else."""
    monkeypatch.setattr(measure, "DENSE", 16)
    generator = torch.Generator().manual_seed(3)
    all_rows = [torch.randn(5, VOCAB, generator=generator) * (0.2 + i / 100) for i in range(400)]
    with writer(tmp_path, codec="prototype", prototypes=TABLE, block_rows=64, shard_bytes=500) as w:
        for i, rows in enumerate(all_rows):
            w.add(i, rows)
    cache = kdfast.cache.open(tmp_path)
    want = distances(torch.cat(all_rows), cache.gather(range(400)), 1.0).kl
    floor = cache.floor
    assert cache.info.shards > 2
    assert floor.rows == 16 + math.floor(16 * math.log(2000 / 16))
    assert abs(floor.kl - float(want.mean())) < 3 * floor.standard_error < 0.5 * float(want.mean())
    assert float(want[:80].mean()) > 2 * float(want.mean())


# ---- sessions, processes, merging -----------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stops", [[], [3], [4, 11, 19], [0, 1]])
def test_a_resumed_writer_keeps_what_was_measured(tmp_path, monkeypatch, stops):
    """Also of records that were parked, and byte for byte."""
    monkeypatch.setattr(measure, "DENSE", 4)

    def fill(path, limit=24):
        with writer(path, codec="topk", k=2, block_rows=5, shard_bytes=300) as w:
            for i in range(24):
                if i == limit:
                    raise Stopped
                if i not in w:
                    w.add(i, rows_of(i))

    fill(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(Stopped):
            fill(tmp_path / "resumed", stop)
    fill(tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    floor = kdfast.cache.open(tmp_path / "whole").floor
    assert floor.rows == 4 + math.floor(4 * math.log(48 / 4))


def test_each_process_measures_its_own_and_a_merge_has_them_all(tmp_path):
    """The floor of the whole is that of all rows, however they were shared out."""
    for name, records in {"a": range(0, 12, 2), "b": range(1, 12, 2)}.items():
        for path in (tmp_path / "together", tmp_path / name):
            with writer(path, codec="dense", bits=4, writer=name) as w:
                for i in records:
                    w.add(i, rows_of(i))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    _, want = expected(tmp_path / "together", "dense", 12)
    parts = [kdfast.cache.open(tmp_path / name).floor for name in "ab"]
    for path in (tmp_path / "together", tmp_path / "merged"):
        floor = kdfast.cache.open(path).floor
        assert floor.rows == sum(part.rows for part in parts) == len(want.kl)
        assert floor.kl == pytest.approx(float(want.kl.mean()), rel=1e-6)
        assert floor.standard_error == pytest.approx(float(want.kl.std()) / math.sqrt(len(want.kl)), rel=1e-6)
        assert json.loads((path / "manifest.json").read_text())["floor"] == floor._asdict()
    assert parts[0].kl != parts[1].kl


def test_sums_that_no_writer_gives_are_refused(tmp_path):
    with writer(tmp_path, codec="dense") as w:
        w.add(0, logits(3))
    shard = tmp_path / "shard-0-00000.safetensors"
    with safe_open(shard, "np") as file:
        good = json.loads(file.metadata()["floor"])
    for at, value, message in [
        (0, 4, "not of 1 to 3 rows"),
        (0, 0, "not of 1 to 3 rows"),
        (0, 2.0, "not of 1 to 3 rows"),
        (3, -1.0, "impossible"),
        (3, 1, "impossible"),
        (1, 0.5, "impossible"),
        (5, 1e101, "impossible"),
        (3, 1e999, "cannot be read"),
        (8, [1.0, 2.0], "impossible"),
    ]:
        with pytest.raises(ValueError, match=message):
            FloorSums.from_metadata({"floor": json.dumps([*good[:at], value, *good[at + 1 :]])}, 3)
    for other in ([*good, 1.0], good[:-1], {"kl": 1.0}, 3):
        with pytest.raises(ValueError, match="not the sums of one"):
            FloorSums.from_metadata({"floor": json.dumps(other)}, 3)
    assert FloorSums.from_metadata({"floor": json.dumps(good)}, 3).rows == 3
    repack(shard, {"floor": json.dumps([4, *good[1:]])})
    with pytest.raises(CacheCorruptError, match=r"shard-0-00000.safetensors: its floor is not of 1 to 3 rows"):
        kdfast.cache.open(tmp_path)
