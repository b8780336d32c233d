"""What a writer finds when it starts: every state that an earlier one can leave, and what others have put there."""

import errno
import json
import os
import shutil
from contextlib import suppress

import pytest
import torch

import kdfast.cache
from kdfast.cache import codecs
from kdfast.cache.format.declared import DECLARATION
from kdfast.cache.format.keys import make_key
from kdfast.cache.write.journal import Journal
from support.caches import contents, logits, write, writer

PART, JOURNAL = "shard-0-00000.safetensors.part", "shard-0.journal"
OPTIONS = {"block_rows": 8, "shard_bytes": 1500}


def stop(path, records=10, codec="topk", **options):
    """A writer that an exception ends: complete blocks in the part, the others parked."""
    with pytest.raises(ZeroDivisionError):
        write(path, range(records), codec, announce=lambda i: 1 // (records - 1 - i), **options)


def keys(path):
    return set(kdfast.cache.open(path))


# ---- clean-up on an error path --------------------------------------------------------------------------------------


def fail_reading(monkeypatch, name):
    """Opening a file of this name for reading fails once."""
    real, strikes = os.open, [1]

    def opening(path, flags, *rest, **options):
        if strikes and str(path).endswith(name) and not flags & os.O_TRUNC:
            strikes.pop()
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", opening)


@pytest.mark.parametrize("name", [PART, JOURNAL])
def test_a_read_error_on_resuming_costs_nothing(tmp_path, monkeypatch, name):
    stop(tmp_path)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        fail_reading(patch, name)
        with pytest.raises(OSError, match="Input/output error"):
            write(tmp_path, range(10))
    assert contents(tmp_path) == before
    assert kdfast.cache.salvage(tmp_path) == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_an_error_while_a_shard_is_taken_up_costs_nothing(tmp_path, monkeypatch, error):
    stop(tmp_path)
    before = contents(tmp_path)
    for act in (lambda: write(tmp_path, range(10)), lambda: kdfast.cache.salvage(tmp_path)):
        with monkeypatch.context() as patch:
            patch.setattr(codecs.TopK, "assets", lambda self: (_ for _ in ()).throw(error()))
            with pytest.raises(error):
                act()
        assert contents(tmp_path) == before
    assert kdfast.cache.salvage(tmp_path) == 10


def test_salvage_without_the_asset_keeps_what_it_cannot_seal_and_seals_the_rest(tmp_path):
    stop(tmp_path, codec="toy", writer="a")
    write(tmp_path, range(10, 20), "toy", writer="z", announce=lambda i: None)
    stop(tmp_path, 30, codec="toy", writer="z")
    table = tmp_path / "toy-table.bin"
    before = {name: data for name, data in contents(tmp_path).items() if "-a" in name}
    shutil.copy(table, tmp_path.parent / "kept")
    table.write_bytes(b"other")
    with pytest.raises(kdfast.cache.CacheError, match="is not the asset"):
        kdfast.cache.salvage(tmp_path)
    assert before.items() <= contents(tmp_path).items()
    shutil.copy(tmp_path.parent / "kept", table)
    assert kdfast.cache.salvage(tmp_path) > 0
    assert keys(tmp_path) >= {make_key(i) for i in range(30)}


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError])
def test_salvage_of_an_unknown_codec_or_options_keeps_what_is_left(tmp_path, monkeypatch, error):
    stop(tmp_path, codec="toy")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "restore", lambda *_: (_ for _ in ()).throw(error("there is no codec 'toy'")))
        with pytest.raises(kdfast.cache.CacheError, match=r"cannot be decoded: .*there is no codec 'toy'"):
            kdfast.cache.salvage(tmp_path)
    assert contents(tmp_path) == before
    assert kdfast.cache.salvage(tmp_path) == 10


# ---- states that restoring has to know ----------------------------------------------------------------------------


@pytest.mark.parametrize("part", [b"", b" " * 100, b" " * 5000])
@pytest.mark.parametrize("act", ["resume", "salvage"])
def test_a_part_without_a_journaled_block_and_parked_records(tmp_path, part, act):
    """Ctrl-C, and a kill of the next writer while it writes the first block; or a disk that is full at that block."""
    write(tmp_path / "whole", range(3), block_rows=100)
    stop(tmp_path / "part", 3, block_rows=100)
    assert not (tmp_path / "part" / PART).exists()
    (tmp_path / "part" / PART).write_bytes(part)
    if act == "resume":
        write(tmp_path / "part", range(3), block_rows=100)
    else:
        assert kdfast.cache.salvage(tmp_path / "part") == 3
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_a_part_whose_blocks_begin_too_early_is_sealed_all_the_same(tmp_path):
    """An earlier version left such parts: it had reserved no room for the header."""
    write(tmp_path / "whole", range(6), block_rows=100)
    stop(tmp_path / "part", 6, block_rows=4)
    journal = Journal(tmp_path / "part" / JOURNAL)
    entries = [(kind, contents) for kind, contents, _ in journal.entries()]
    data = (tmp_path / "part" / PART).read_bytes()
    first = next(int(values["block"][2]) for kind, values in entries if kind == "B")
    for kind, values in entries:
        if kind == "B":
            values["block"][2] = 0
    journal.start_over(entries)
    journal.close(remove=False)
    (tmp_path / "part" / PART).write_bytes(data[first:])
    kdfast.cache.salvage(tmp_path / "part")
    kdfast.cache.open(tmp_path / "part").verify()
    labels = [kdfast.cache.open(tmp_path / name).gather(range(6)) for name in ("part", "whole")]
    assert torch.equal(labels[0].ids, labels[1].ids)
    assert torch.equal(labels[0].values, labels[1].values)


def test_parked_records_survive_the_seal_of_their_shard(tmp_path):
    """Parked records that come after a shard's end are noted for the next shard before the journal forgets them."""
    stop(tmp_path, 5, block_rows=1000)
    real, made = os.pwrite, []

    class Killed(BaseException):
        pass

    for calls in range(1, 40):
        copy = tmp_path.parent / f"copy{calls}"
        shutil.copytree(tmp_path, copy)
        made.clear()

        def pwrite(*arguments, calls=calls):
            made.append(1)
            if len(made) > calls:
                raise Killed
            return real(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            try:
                write(copy, [], block_rows=1, shard_bytes=1)
                break
            except Killed:
                pass
        kdfast.cache.salvage(copy)
        assert keys(copy) == {make_key(i) for i in range(5)}, calls
        shutil.rmtree(copy)
    assert calls > 10


def test_a_sync_that_failed_is_not_believed_the_second_time(tmp_path, monkeypatch):
    """What the system could not write it forgets: all is written again, to another file."""
    write(tmp_path / "whole", range(6))
    real, strikes, synced = os.fsync, [1], []

    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if "shard-0" in name and strikes:
            strikes.pop()
            raise OSError(errno.EIO, "Input/output error")
        synced.append(os.path.basename(name))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    w = writer(tmp_path / "part", **OPTIONS)
    for i in range(6):
        w.add(i, logits(2, seed=i))
    with pytest.raises(OSError, match="Input/output error"):
        w.close()
    w.close()
    shard = [name for name in synced if name.startswith("shard-0-")]
    assert len(shard) == 1
    assert shard[0] != PART
    assert shard[0].startswith("shard-0-00000.safetensors.")
    kdfast.cache.open(tmp_path / "part").verify()
    assert not list((tmp_path / "part").glob("*.part"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("B", {"block": torch.zeros(3)})], "cannot be continued: it has an entry of kind 'B'"),
        ([("S", {"other": torch.zeros(3)})], "cannot be continued: KeyError"),
        ([("S", {"shard": torch.tensor([123], dtype=torch.uint8)})], "cannot be continued: JSON"),
        ([{"version": 2, "name": "", "metadata": {}}], "has version 2"),
        ([{"version": 1, "name": "../x", "metadata": {}}], "tells of '../x', which is not a shard"),
        (
            [{"version": 1, "name": "shard-1-00000.safetensors", "metadata": {}}],
            "which is not a shard of this writer|is not a kdfast-cache file",
        ),
        ([{"version": 1, "name": "shard-0-00000.safetensors", "metadata": {}}, ("P", {})], "cannot be continued"),
    ],
)
def test_a_journal_that_no_writer_wrote_is_named_and_kept(tmp_path, entries, message):
    journal = Journal(tmp_path / JOURNAL)
    made = [entry if isinstance(entry, tuple) else ("S", {"shard": as_bytes(entry)}) for entry in entries]
    journal.start_over(made)
    journal.close(remove=False)
    before = contents(tmp_path)
    for act in (lambda: writer(tmp_path), lambda: kdfast.cache.salvage(tmp_path)):
        with pytest.raises(kdfast.cache.CacheError, match=message):
            act()
        assert contents(tmp_path) == before


def stop_with_targets(path):
    """A writer that ends with three blocks of two records, and one parked."""
    w = writer(path, block_rows=4)
    for i in range(7):
        w.add(i, logits(2, seed=i), targets=torch.tensor([1, 2]))
    with suppress(ZeroDivisionError), w:
        raise ZeroDivisionError


def changed(path, change):
    """``change(kind, contents)`` done to every entry of the journal, with right checksums."""
    journal = Journal(path / JOURNAL)
    entries = [(kind, dict(parts)) for kind, parts, _ in journal.entries()]
    for kind, parts in entries:
        change(kind, parts)
    journal.start_over(entries)
    journal.close(remove=False)


def of(kind, name, value):
    """A change of one part of the entries of a kind; ``value`` is made of the part, or None to drop it."""

    def change(found, parts):
        if found == kind:
            made = value(parts.pop(name))
            parts.update({} if made is None else {name: made})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of("B", "records.target_crc", lambda x: None), "targets lack a column"),
        (of("B", "records.rows", lambda x: x - 2**40), "impossible numbers of rows"),
        (of("B", "records.rows", lambda x: x[:-1]), r"its keys are uint8 \(\d+, 16\)"),
        (of("B", "records.rows", lambda x: x.float()), "its rows are float32"),
        (of("B", "records.target_count", lambda x: x + 100), "more than its rows"),
        (of("B", "records.cross_entropy", lambda x: x / 0), "not finite"),
        (of("P", "records.rows", lambda x: x + 1), "parked labels are"),
        (of("P", "labels.values", lambda x: x * 0 + 5), "codec 'topk' cannot store it: a log-probability"),
    ],
)
def test_columns_that_no_writer_notes_are_named_and_kept(tmp_path, change, message):
    stop_with_targets(tmp_path)
    changed(tmp_path, change)
    before = contents(tmp_path)
    for act in (lambda: writer(tmp_path, block_rows=4), lambda: kdfast.cache.salvage(tmp_path)):
        with pytest.raises(kdfast.cache.CacheError, match=message):
            act()
        assert contents(tmp_path) == before


@pytest.mark.parametrize("names", [["target_crc", "cross_entropy", "target_count"]])
def test_records_with_and_without_targets_are_in_no_shard(tmp_path, names):
    """Sealing would have failed on it, and not by name."""
    stop_with_targets(tmp_path)
    changed(tmp_path, lambda kind, parts: [parts.pop(f"records.{name}") for name in names if kind == "P"])
    with pytest.raises(kdfast.cache.CacheError, match="some of its records have targets or views, and others have"):
        writer(tmp_path, block_rows=4)


def test_parked_records_of_more_entries_than_the_codec_stores_are_named(tmp_path):
    stop(tmp_path, 2)

    def narrowed(text):
        document = json.loads(text.numpy().tobytes())
        document["metadata"]["codec_config"] = document["metadata"]["codec_config"].replace('"k":4', '"k":3')
        return as_bytes(document)

    changed(tmp_path, of("S", "shard", narrowed))
    (tmp_path / DECLARATION).unlink()
    with pytest.raises(kdfast.cache.CacheError, match=r"cannot be continued: a row has 4 entries, .* stores k=3"):
        writer(tmp_path, k=3)


def as_bytes(document):
    return torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)


def test_salvage_removes_what_was_half_published_long_ago(tmp_path):
    write(tmp_path, range(3))
    before = contents(tmp_path)
    old, new = tmp_path / "manifest.json.12-0123abcd.part", tmp_path / "manifest.json.13-0123abcd.part"
    for path in (old, new):
        path.write_text("x")
    os.utime(old, (0, 0))
    assert kdfast.cache.salvage(tmp_path) == 0
    assert not old.exists()
    assert new.exists()
    assert contents(tmp_path) == before


# ---- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["symbolic", "hard", "dangling", "fifo"])
@pytest.mark.parametrize("name", [PART, JOURNAL])
def test_planted_links_do_not_cost_their_target(tmp_path, name, kind):
    cache, target = tmp_path / "cache", tmp_path / "precious"
    cache.mkdir()
    if kind == "fifo":
        os.mkfifo(cache / name)
    elif kind == "dangling":
        (cache / name).symlink_to(target)
    else:
        target.write_text("precious")
        (os.symlink if kind == "symbolic" else os.link)(target, cache / name)
    if name == JOURNAL and kind != "hard":
        with pytest.raises(kdfast.cache.CacheError, match=rf"{JOURNAL} is .*, which no writer makes: remove it"):
            write(cache, range(10))
    else:  # nobody's, and not followed; a copy takes the place of a file that has other names
        write(cache, range(10))
        kdfast.cache.open(cache).verify()
    if kind in ("symbolic", "hard"):
        assert target.read_text() == "precious"
    assert not (kind == "dangling" and target.exists())


def test_a_backup_of_hard_links_stays_what_it_is(tmp_path):
    write(tmp_path / "whole", range(30))
    stop(tmp_path / "cache", 20)
    shutil.copytree(tmp_path / "cache", tmp_path / "backup", copy_function=os.link)
    before = contents(tmp_path / "backup")
    write(tmp_path / "cache", range(30))
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert contents(tmp_path / "backup") == before


@pytest.mark.parametrize("position", [0, 4, 9, 200])
def test_a_journal_whose_first_entry_is_damaged_is_named_and_kept(tmp_path, position):
    """Everything that it tells of would otherwise be forgotten, and the part file begun anew."""
    stop(tmp_path, 20)
    data = bytearray((tmp_path / JOURNAL).read_bytes())
    good = bytes(data)
    data[position] ^= 1
    (tmp_path / JOURNAL).write_bytes(data)
    before = contents(tmp_path)
    for act in (lambda: write(tmp_path, range(20)), lambda: kdfast.cache.salvage(tmp_path)):
        with pytest.raises(kdfast.cache.CacheCorruptError, match="its first entry is not what was written"):
            act()
        assert contents(tmp_path) == before
    (tmp_path / JOURNAL).write_bytes(good)
    kdfast.cache.salvage(tmp_path)
    assert len(kdfast.cache.open(tmp_path)) == 20


def test_a_part_that_has_become_a_link_is_not_resumed(tmp_path):
    stop(tmp_path, 10)
    (tmp_path / PART).rename(tmp_path / "moved")
    (tmp_path / PART).symlink_to(tmp_path / "moved")
    before = (tmp_path / "moved").read_bytes()
    for act in (lambda: write(tmp_path, range(10)), lambda: kdfast.cache.salvage(tmp_path)):
        with pytest.raises(kdfast.cache.CacheError, match="is a symbolic link"):
            act()
    assert (tmp_path / "moved").read_bytes() == before
    assert (tmp_path / DECLARATION).exists()
