"""What writer and reader do when something is wrong: a named error, and nothing half-written."""

import errno
import os
import re

import numpy as np
import pytest
import torch

import kdfast.cache
from support.caches import VOCAB, logits, writer


def fill(path, keys, **options):
    """A cache of one row per key."""
    with writer(path, **options) as w:
        for key in keys:
            w.add(key, logits(1))
    return kdfast.cache.open(path)


def test_missing_keys_are_named(tmp_path):
    cache = fill(tmp_path, ["a"])
    assert not any(key in cache for key in range(50))  # digests before and after the stored one
    for key, name in [("b", "'b'"), (torch.arange(9), r"ids \[0, 1, 2, 3, \.\.\.\]")]:
        with pytest.raises(KeyError, match=f"{name}.* is not in .*{tmp_path.name}"):
            cache.gather(["a", key])


def test_two_writers_of_one_name_do_not_overwrite(tmp_path):
    with writer(tmp_path) as first:
        first.add("a", logits(1))
        with pytest.raises(kdfast.cache.CacheBusyError, match=r"shard-0.journal belongs to a writer .* its own name"):
            writer(tmp_path)
    with writer(tmp_path) as second:
        assert "a" in second
        second.add("b", logits(1))
    assert list(kdfast.cache.open(tmp_path)) == [kdfast.cache.format.keys.make_key(key) for key in "ab"]


def test_a_shard_of_another_machine_is_not_overwritten(tmp_path):
    fill(tmp_path / "other", ["b"])
    w = writer(tmp_path)
    w.add("a", logits(1))
    os.replace(tmp_path / "other" / "shard-0-00000.safetensors", tmp_path / "shard-0-00000.safetensors")
    with pytest.raises(kdfast.cache.CacheError, match=r"shard-0-00000.safetensors appeared.* its own name"):
        w.close()
    assert list(kdfast.cache.open(tmp_path)) == [kdfast.cache.format.keys.make_key("b")]
    (tmp_path / "shard-0-00000.safetensors").unlink()
    w.close()  # once its name is its own again
    assert list(kdfast.cache.open(tmp_path)) == [kdfast.cache.format.keys.make_key("a")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "other"}, r"this writer has teacher='other', but .*shard-0-00000.safetensors has teacher='t'"),
        ({"k": 5}, r"has config=\{'k': 5, .*, but .* has config=\{'k': 4"),
        ({"temperatures": (1.0, 2.0)}, r"temperatures=\(1.0, 2.0\), but .* temperatures=\(1.0,\)"),
        ({"vocab_size": 12, "teacher": "u"}, "vocab_size=12, teacher='u', but .* vocab_size=11, teacher='t'"),
    ],
)
def test_another_setting_is_refused(tmp_path, change, message):
    fill(tmp_path, ["a"])
    with pytest.raises(kdfast.cache.CacheMismatchError, match=message):
        writer(tmp_path, **change)


def test_shards_of_two_caches_do_not_mix(tmp_path):
    fill(tmp_path / "a", ["a"])
    fill(tmp_path / "b", ["b"], teacher="u", writer="1")
    os.replace(tmp_path / "b" / "shard-1-00000.safetensors", tmp_path / "a" / "shard-1-00000.safetensors")
    with pytest.raises(
        kdfast.cache.CacheMismatchError, match=r"shard-1.* has teacher='u', but .*shard-0.* teacher='t'"
    ):
        kdfast.cache.open(tmp_path / "a")


def fail_after(records, writer):
    """Records of 9, 8, ... rows, then an exception inside the ``with`` block."""

    def teacher():
        with writer as w:
            for i in range(records):
                w.add(i, logits(9 - i, seed=i))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        teacher()


@pytest.mark.parametrize("shard_bytes", [400, 2**20])
def test_an_exception_loses_nothing(tmp_path, shard_bytes):
    options = {"shard_bytes": shard_bytes, "block_rows": 4}
    fail_after(9, writer(tmp_path / "a", **options))
    names = {re.sub(r"\d{5}", "N", p.name) for p in (tmp_path / "a").iterdir()}
    assert "shard-0.journal" in names
    assert names <= {"cache.json", "shard-0-N.safetensors", "shard-0-N.safetensors.part", "shard-0.journal"}
    with writer(tmp_path / "a", **options) as w:
        assert all(i in w for i in range(9))
    with writer(tmp_path / "b", **options) as w:
        for i in range(9):
            w.add(i, logits(9 - i, seed=i))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_an_exception_before_the_first_record_leaves_nothing(tmp_path):
    fail_after(0, writer(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(kdfast.cache.CacheError, match="holds no shard of a kdfast cache"):
        kdfast.cache.open(tmp_path)


def test_a_closed_writer_refuses(tmp_path):
    with writer(tmp_path) as w:
        w.add(0, logits(1))
    w.close()
    with pytest.raises(kdfast.cache.CacheError, match="is closed"):
        w.add(1, logits(1))


def test_bad_rows_are_refused_and_the_rest_goes_on(tmp_path):
    with writer(tmp_path) as w:
        for value, problem in [(torch.nan, "value of nan"), (torch.inf, "value of inf"), (-torch.inf, "no finite")]:
            bad = logits(5)
            bad[3, slice(None) if value == -torch.inf else 2] = value
            with pytest.raises(ValueError, match=f"'a': row 3 has .*{problem}"):
                w.add("a", bad)
        w.add("a", logits(2))
    assert len(kdfast.cache.open(tmp_path)["a"]) == 2


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(2, VOCAB, dtype=torch.int64), TypeError, "'a': logits must be a floating-point tensor, got torch"),
        (np.zeros((2, VOCAB)), TypeError, "got ndarray"),
        (torch.zeros(2, VOCAB + 1), ValueError, r"must be \(rows, 11\) or \(11,\), got \(2, 12\)"),
        (torch.zeros(1, 2, VOCAB), ValueError, r"got \(1, 2, 11\)"),
        (torch.zeros(VOCAB - 1), ValueError, r"got \(10,\)"),
        (torch.tensor(0.0), ValueError, r"got \(\)"),
    ],
)
def test_bad_logits_are_named(tmp_path, bad, error, message):
    with writer(tmp_path) as w, pytest.raises(error, match=message):
        w.add("a", bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"writer": "a-b"}, "writer must consist of letters, digits and _, got 'a-b'"),
        ({"shard_bytes": 0}, "must be positive, got 0 and 1024"),
        ({"block_rows": 0}, "must be positive, got .* and 0"),
        ({"codec": "zip"}, "codec must be one of"),
    ],
)
def test_bad_writer_options_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        writer(tmp_path / "new", **change)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_is_named_and_tried_again(tmp_path, monkeypatch, call):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    w = writer(tmp_path)
    w.add("a", logits(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=r"No space left on device: .*shard-0-00000.safetensors"):
            w.close()
    assert not list(tmp_path.glob("shard-*.safetensors"))
    w.close()  # once there is room again
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cache.json",
        "index.safetensors",
        "manifest.json",
        "shard-0-00000.safetensors",
    ]
    assert len(kdfast.cache.open(tmp_path)["a"]) == 1


def test_unreadable_places_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        kdfast.cache.open(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="file"):
        kdfast.cache.open(tmp_path / "file")
    (tmp_path / "shard-0-00000.safetensors").mkdir()
    with pytest.raises(kdfast.cache.CacheCorruptError, match=r"shard-0-00000.*: is no regular file"):
        kdfast.cache.open(tmp_path)


def test_a_shard_that_vanishes_or_shrinks_after_opening_is_named(tmp_path):
    cache = fill(tmp_path, ["a"])
    shard = tmp_path / "shard-0-00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(kdfast.cache.CacheCorruptError, match=r"shard-0-00000.safetensors: has changed size"):
        cache["a"]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="shard-0-00000"):
        cache["a"]


def test_a_shard_replaced_after_opening_is_noticed_by_verify(tmp_path):
    cache = fill(tmp_path / "a", ["a"])
    fill(tmp_path / "b", ["b"])
    os.replace(*(tmp_path / name / "shard-0-00000.safetensors" for name in "ba"))
    with pytest.raises(kdfast.cache.CacheCorruptError, match="has been replaced since it was opened"):
        cache.verify()
