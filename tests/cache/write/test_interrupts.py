"""Ctrl-C between any two lines of a writer's caller, twice: nothing is lost, nothing hangs, nothing is doubled."""

import gc
import shutil
import sys
import threading
import time

import pytest

import kdfast.cache
from kdfast.cache import codecs
from kdfast.cache.format.keys import make_key
from kdfast.cache.write.journal import is_alive
from support.caches import Toy, contents, logits, write, writer

ROOM = ("cache/write/writer.py", "cache/write/writer_thread.py", "cache/write/session.py")


class Interrupter:
    """Raises ``KeyboardInterrupt`` at some of the lines that this thread runs in the writer's modules."""

    def __init__(self, *lines):
        self.lines, self.count = set(lines), 0

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.endswith(ROOM) or frame.f_code.co_name in ("__init__", "_alone"):
            return None
        return self.line

    def line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.count in self.lines:
                raise KeyboardInterrupt
        return self.line

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


def session(path, *lines, records=3):
    """Add some records, with an interrupt at some lines. Returns whether there was one, and how many were accepted."""
    made = writer(path, block_rows=4)
    accepted = 0
    try:
        with Interrupter(*lines) as interrupter, made:
            for i in range(records):
                if i not in made:
                    made.add(i, logits(2, seed=i))
                accepted += 1
    except KeyboardInterrupt:
        pass
    else:
        return False, accepted
    assert interrupter.count >= min(lines)
    return True, accepted


def left(path):
    """How many records can be had without feeding any again."""
    kdfast.cache.salvage(path)
    try:
        return len(kdfast.cache.open(path))
    except kdfast.cache.CacheError:
        return 0


def collect(path):
    """Where even the way out was interrupted the writer is dropped, and collected."""
    if any(map(is_alive, path.glob("*.journal"))):
        gc.collect()


EVERY = pytest.param(1, marks=pytest.mark.full)


@pytest.mark.filterwarnings("ignore:the writer of:ResourceWarning")
@pytest.mark.parametrize("step", [EVERY, 11])
def test_interrupted_at_any_line(tmp_path, step):
    session(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    line = 0
    interrupted = True
    while interrupted:
        line += step
        interrupted, accepted = session(tmp_path / "part", line)
        collect(tmp_path / "part")
        shutil.copytree(tmp_path / "part", tmp_path / "salvaged")
        assert left(tmp_path / "salvaged") >= accepted, line
        session(tmp_path / "part")
        assert contents(tmp_path / "part") == whole, line
        shutil.rmtree(tmp_path / "part")
        shutil.rmtree(tmp_path / "salvaged")
    assert line > 50


@pytest.mark.filterwarnings("ignore:the writer of:ResourceWarning")
@pytest.mark.parametrize("step", [EVERY, 9])
def test_a_second_interrupt_on_the_way_out_loses_nothing(tmp_path, step):
    for first, second in [(first, first + later) for first in (20, 60) for later in range(1, 40, step)]:
        _, accepted = session(tmp_path / "part", first, second)
        collect(tmp_path / "part")
        assert left(tmp_path / "part") >= accepted, (first, second)
        shutil.rmtree(tmp_path / "part")


def test_consecutive_keys_stay_right_after_an_interrupt(tmp_path):
    """A record that was queued when the interrupt came is known to be there: it cannot be added twice."""
    for line in range(1, 80, 4):
        w = writer(tmp_path / "range", keys="range", block_rows=4)
        with w:
            for i in range(3):
                try:
                    with Interrupter(line - 25 * i):
                        w.add(i, logits(1, seed=i))
                except KeyboardInterrupt:
                    if i not in w:
                        w.add(i, logits(1, seed=i))
            assert w.report[:3] == (3, 3, 0)
        cache = kdfast.cache.open(tmp_path / "range")
        assert list(cache) == [0, 1, 2]
        for i in range(3):
            assert cache[i].ids.tolist() == logits(1, seed=i).topk(4).indices[0].tolist(), (line, i)
        shutil.rmtree(tmp_path / "range")


@codecs.register
class Slow(Toy):
    """Encodes nothing before it is told to."""

    name = "slow toy"
    go = threading.Event()

    def encode(self, labels):
        self.go.wait()
        return super().encode(labels)


def test_leaving_waits_for_the_records_in_the_queue_whatever_interrupts_it(tmp_path):
    """The queue is full and the thread at work, when the interrupts come."""
    Slow.go.clear()
    made = kdfast.cache.Writer(tmp_path, vocab_size=11, codec="slow toy", block_rows=1)
    for i in range(8):
        made.add(i, logits(1, seed=i))
    caught = []

    def leave():
        try:
            made.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        except KeyboardInterrupt as interrupt:
            caught.append(interrupt)

    real, strikes = made._thread._state.wait, []

    def wait(done):
        if len(strikes) < 5:
            strikes.append(1)
            raise KeyboardInterrupt
        Slow.go.set()
        real(done)

    made._thread._state.wait = wait
    leave()
    assert len(caught) == 1
    assert kdfast.cache.salvage(tmp_path) == 8


def test_a_start_that_was_interrupted_leaves_one_thread_at_work(tmp_path, monkeypatch):
    real = threading.Thread.start
    for after in (False, True):
        strikes = [1]

        def start(self, after=after, strikes=strikes):
            if strikes:
                strikes.pop()
                if after:
                    real(self)
                raise KeyboardInterrupt
            real(self)

        path = tmp_path / str(after)
        with writer(path, block_rows=1) as w:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                with pytest.raises(KeyboardInterrupt):
                    w.add(0, logits(1))
            for i in range(5):
                if i not in w:
                    w.add(i, logits(1, seed=i))
        assert list(kdfast.cache.open(path)) == [make_key(i) for i in range(5)]


def test_a_writer_that_is_dropped_keeps_its_records_and_says_so(tmp_path):
    w = writer(tmp_path)
    for i in range(5):
        w.add(i, logits(2, seed=i))
    kept = [w]
    del w
    with pytest.warns(ResourceWarning, match="was not closed: what it had is kept"):
        kept.clear()
    assert kdfast.cache.salvage(tmp_path) == 5
    cache = kdfast.cache.open(tmp_path)
    assert [len(cache[i]) for i in range(5)] == [2] * 5


def test_a_writer_that_is_dropped_in_its_own_thread_does_not_wait_for_itself(tmp_path):
    w = writer(tmp_path)
    w.add(0, logits(2))
    w._thread.drain()
    thread, leaving = w._thread, w._leaving
    w._finalizer.detach()
    thread._state.job = lambda: thread.end(leaving)
    thread._state.wake.put(None)
    del w
    until = time.monotonic() + 20
    while not thread.ended:
        assert time.monotonic() < until
        time.sleep(0.001)
    assert kdfast.cache.salvage(tmp_path) == 1


def test_durable_records_are_never_too_many(tmp_path, monkeypatch):
    """Also while a shard is sealed, which another thread may look at."""
    seen = []
    made = kdfast.cache.Writer(tmp_path, vocab_size=11, codec="topk", k=4, block_rows=1, shard_bytes=1)
    real = made._builder._start

    def start(number):
        seen.append((made.durable_records, number))
        return real(number)

    monkeypatch.setattr(made._builder, "_start", start)
    with made:
        for i in range(4):
            made.add(i, logits(1))
    assert seen == [(n, n) for n in range(1, 5)]
    write(tmp_path / "other", range(3))
