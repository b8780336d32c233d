"""A writer that is killed: what it had written stays, and its successor's shards are those it would have written."""

import multiprocessing
import os
import random
import shutil
import signal
import warnings

import numpy as np
import pytest
import torch

import kdfast.cache
from kdfast.cache.format.keys import make_key
from kdfast.cache.write.journal import Journal
from kdfast.cache.write.unfinished import Unfinished
from support.caches import contents, logits, record, write
from support.children import write_and_tell

RECORDS = 120
CODECS = ["topk", "toy"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["kdfast.cache"])


def kill_after(path, codec, last):
    """Run a writer in a process of its own, and SIGKILL it once it has added record ``last``."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=write_and_tell, args=(path, codec, RECORDS, sender))
    process.start()
    sender.close()
    while receiver.recv() < last:
        pass
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run writes, by codec."""
    paths = {codec: tmp_path_factory.mktemp(codec) for codec in CODECS}
    for codec, path in paths.items():
        write(path, range(RECORDS), codec)
    return {codec: contents(path) for codec, path in paths.items()}


def check_resumed(path, codec, whole):
    write(path, range(RECORDS), codec)
    assert contents(path) == whole[codec]


@pytest.mark.parametrize(("codec", "kills"), [("topk", [3, 60]), ("toy", [20]), ("toy", [70, 100])])
def test_a_killed_writer_resumes_byte_for_byte(tmp_path, whole, codec, kills):
    for last in kills:
        kill_after(tmp_path, codec, last)
    check_resumed(tmp_path, codec, whole)
    assert len(whole[codec]) > 4
    kdfast.cache.open(tmp_path).verify()


@pytest.mark.full
@pytest.mark.parametrize("seed", range(50))
def test_killed_at_many_points(tmp_path, whole, seed):
    draw = random.Random(seed)
    codec = CODECS[seed % 2]
    for last in sorted(draw.choices(range(RECORDS - 1), k=draw.choice([1, 1, 2]))):
        kill_after(tmp_path, codec, last)
    check_resumed(tmp_path, codec, whole)


class Killed(BaseException):
    """Stands for a kill: nothing that the writer does after it reaches the disk."""


CALLS = ("pwrite", "ftruncate", "fsync", "replace", "unlink")


def stop_at(monkeypatch, call):
    """Let the first ``call`` system calls that change a file happen, and no later one. Returns their names."""
    made = []

    def stopping(name, real):
        def wrapper(*args, **keywords):
            made.append(name)
            if len(made) > call:
                raise Killed
            return real(*args, **keywords)

        return wrapper

    for name in CALLS:
        monkeypatch.setattr(os, name, stopping(name, getattr(os, name)))
    return made


def stopped(path, codec, records, call):
    """The system call that a writer was stopped at; None if it came to its end."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says what it could not keep
        made = stop_at(patch, call)
        try:
            write(path, range(records), codec)
        except Killed:
            return made[call]
    return None


@pytest.mark.parametrize("codec", CODECS)
def test_stopped_at_every_system_call(tmp_path, codec):
    """Every state that the files can be in between two system calls, over two shards and the manifest."""
    write(tmp_path / "whole", range(25), codec)
    whole = contents(tmp_path / "whole")
    assert len(whole) > 2
    reached = []
    while (name := stopped(tmp_path / "part", codec, 25, len(reached))) is not None:
        reached.append(name)
        write(tmp_path / "part", range(25), codec)
        assert contents(tmp_path / "part") == whole, f"stopped at {len(reached)}: {name}"
        shutil.rmtree(tmp_path / "part")
    assert set(reached) == set(CALLS)


PART, JOURNAL = "shard-0-00000.safetensors.part", "shard-0.journal"


def leave(writer, records):
    """An exception after some records of two rows; the sizes of part and journal after each."""
    sizes = []
    with writer:
        for i in records:
            writer.add(i, logits(2, seed=i), targets=torch.tensor([i, -100]))
            writer._thread.drain()
            folder = writer._storage.directory
            sizes.append([(folder / name).stat().st_size for name in (PART, JOURNAL) if (folder / name).exists()])
        raise ZeroDivisionError(sizes)


@pytest.fixture
def torn(tmp_path):
    """An unfinished shard of four blocks, and how long its files were after the third and the fourth."""
    writer = kdfast.cache.Writer(tmp_path, vocab_size=11, codec="topk", k=4, block_rows=4)
    with pytest.raises(ZeroDivisionError) as caught:
        leave(writer, range(8))
    sizes = caught.value.args[0]
    assert [(tmp_path / name).stat().st_size for name in (PART, JOURNAL)] == sizes[7]
    return tmp_path, sizes[5], sizes[7]


def left_in(path):
    """The keys of what can be restored."""
    journal = Journal(path / JOURNAL)
    try:
        shard, parked = Unfinished.restore(path, journal)
        assert not parked
        return list(shard.tables.keys())
    finally:
        journal.close(remove=False)


@pytest.mark.parametrize("which", [0, 1])
def test_a_torn_end_costs_the_last_block_only(torn, which):
    path, before, after = torn
    data = [(path / name).read_bytes() for name in (PART, JOURNAL)]
    keys = [make_key(i) for i in range(8)]
    for length in range(before[which], after[which]):
        (path / JOURNAL).write_bytes(data[1])
        (path / (PART, JOURNAL)[which]).write_bytes(data[which][:length])
        assert left_in(path) == keys[:6], length
    kdfast.cache.salvage(path)
    cache = kdfast.cache.open(path)
    cache.verify()
    assert list(cache) == keys[:6]


@pytest.mark.parametrize("which", [0, 1])
def test_a_flipped_bit_of_the_last_block_costs_that_block_only(torn, which):
    path, before, after = torn
    data = [bytearray((path / name).read_bytes()) for name in (PART, JOURNAL)]
    keys = [make_key(i) for i in range(8)]
    for position in range(before[which], after[which], 5):
        data[which][position] ^= 1 << position % 8
        for name, content in zip((PART, JOURNAL), data, strict=True):
            (path / name).write_bytes(content)
        assert left_in(path) == keys[:6], position
        data[which][position] ^= 1 << position % 8


def test_salvage_leaves_live_writers_alone(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, range(10), writer="dead", announce=lambda i: 1 // (9 - i))
    with kdfast.cache.Writer(tmp_path, vocab_size=11, codec="topk", k=4, teacher="t", writer="live", block_rows=1) as w:
        w.add("live", logits(1))
        w._thread.drain()
        part = (tmp_path / "shard-live-00000.safetensors.part").read_bytes()
        assert kdfast.cache.salvage(tmp_path) == 10
        assert (tmp_path / "shard-live-00000.safetensors.part").read_bytes() == part
        assert len(kdfast.cache.open(tmp_path)) == 10
        assert kdfast.cache.salvage(tmp_path) == 0
    assert len(kdfast.cache.open(tmp_path)) == 11


def test_another_name_leaves_what_a_killed_writer_left(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, range(10), writer="dead", announce=lambda i: 1 // (9 - i))
    left = contents(tmp_path)
    write(tmp_path, range(20, 30), writer="other")
    assert contents(tmp_path).items() >= left.items()


@pytest.mark.parametrize("codec", CODECS)
def test_salvage_seals_everything_that_an_exception_left(tmp_path, codec):
    """The toy has not even learned when it happens."""
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, range(10), codec, announce=lambda i: 1 // (9 - i))
    assert kdfast.cache.salvage(tmp_path) == 10
    cache = kdfast.cache.open(tmp_path)
    assert np.array_equal([len(cache[i]) for i in range(10)], [len(record(i)[1]) for i in range(10)])


def test_many_exceptions_lose_nothing(tmp_path, whole):
    """Records parked in the journal move into blocks, into the journal again, and into another shard's."""
    for codec in CODECS:
        for last in [0, 1, 5, 5, 17, 18, 40, 41, 80]:
            with pytest.raises(ZeroDivisionError):
                write(tmp_path / codec, range(last + 1), codec, announce=lambda i, last=last: 1 // (last - i))
        check_resumed(tmp_path / codec, codec, whole)


def test_parked_records_that_went_into_a_block_are_not_parked_any_more(tmp_path):
    for start, stop in ((0, 1), (1, 4)):  # six rows parked; then a block of eight
        w = kdfast.cache.Writer(tmp_path, vocab_size=11, codec="topk", k=4, block_rows=8)
        with pytest.raises(ZeroDivisionError):
            leave(w, range(start, stop))
    assert left_in(tmp_path) == [make_key(i) for i in range(4)]


def test_another_cache_does_not_resume_what_was_left(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, range(10), announce=lambda i: 1 // (9 - i))
    left = contents(tmp_path)
    with pytest.raises(kdfast.cache.CacheMismatchError, match=r"teacher='u', but .*00000.safetensors.part has"):
        write(tmp_path, range(10), teacher="u")
    assert contents(tmp_path) == left


def test_a_part_without_its_journal_does_not_hinder(tmp_path, whole):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, range(30), announce=lambda i: 1 // (29 - i))
    (tmp_path / JOURNAL).unlink()
    check_resumed(tmp_path, "topk", whole)
