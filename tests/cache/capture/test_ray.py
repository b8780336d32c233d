"""ray_capture: what is stored, whoever stores it; and what is left when a worker fails."""

import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import kdfast.cache
from kdfast.cache import CacheBusyError, CacheError, capture, ray_capture
from kdfast.cache.capture.ranks import Ranks
from kdfast.cache.codecs.base import PREPARE_ROWS
from support import ROOT
from support.caches import VOCAB
from support.children import Teacher

# Ray Data warns of options of its own that nobody here has set.
pytestmark = pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning:ray.data.context")

module = importlib.import_module("kdfast.cache.capture.ray")
SECONDS = 240  # after which a test hangs
BATCH = 4
CODECS = {
    "topk": {"codec": "topk", "k": 3},
    "sample": {"codec": "sample", "draws": 6},
    "prototype": {"codec": "prototype", "k": 2, "prototypes": 3},
}


@pytest.fixture(autouse=True)
def _bounded():
    def give_up(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 10)  # again, for who waits while handling the first
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else a token is written to the home directory
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))  # for support.children
        import ray
        import ray.data

        options = {"include_dashboard": False, "object_store_memory": 100 * 2**20, "log_to_driver": False}
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.init(address="local", num_cpus=2, **options)
        yield ray
        ray.shutdown()


@pytest.fixture
def dataset(cluster):
    """Makes a dataset of ids, in blocks of BATCH records."""

    def make(ids):
        items = [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in ids.numpy()]
        return cluster.data.from_items(items, override_num_blocks=len(ids) // BATCH)

    return make


def ids(records, length):
    return torch.randint(0, VOCAB, (records, length))


def batches(ids):
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)]


def by_ray(data, path, codec, workers, make_teacher=Teacher):
    options = {"vocab_size": VOCAB, "teacher": "t", "batch_size": BATCH, "num_cpus": 0.5}
    return ray_capture(make_teacher, data, path, workers=workers, **options, **CODECS[codec])


def assert_same(path, ids, codec, tmp_path):
    """As plain capture's, to the bit."""
    capture(Teacher(), batches(ids), tmp_path / "plain", vocab_size=VOCAB, teacher="t", progress=False, **CODECS[codec])
    ours, plain = (kdfast.cache.open(folder) for folder in (path, tmp_path / "plain"))
    assert (len(ours), ours.info.duplicates) == (len(ids), 0)
    for got, wanted in zip(parts(ours.gather(ids)), parts(plain.gather(ids)), strict=True):
        assert torch.equal(got, wanted)
    assert not list(path.glob("*.journal"))


def parts(labels):
    """A row's entries by their columns: their order depends on the rows that the writer learned its coding from."""
    values = torch.full((len(labels), VOCAB), -torch.inf)
    values[torch.arange(len(labels)).repeat_interleave(labels.offsets.diff()), labels.ids.long()] = (
        labels.values.float()
    )
    return [values, *(part for part in (labels.tails, labels.prototype_ids, labels.prototypes) if part is not None)]


def test_workers_store_what_capture_stores_with_one_table_of_prototypes(tmp_path, dataset):
    """Prototypes are learned of the first records by one worker; then two of them store the rest."""
    data = ids(48, 2048)
    learned, count = PREPARE_ROWS // data[:BATCH].numel(), len(data) // BATCH
    assert learned < count - 1
    report = by_ray(dataset(data), tmp_path / "ray", "prototype", 2)
    assert report == (count, learned, len(data), data.numel())
    assert {file.name.split("-")[1] for file in (tmp_path / "ray").glob("shard-*")} == {"0of2", "1of2"}
    assert_same(tmp_path / "ray", data, "prototype", tmp_path)
    assert by_ray(dataset(data), tmp_path / "ray", "prototype", 1) == (0, count, 0, 0)


def failing(folder, record, fail):
    """A teacher that leaves a file for each batch, and fails at ``record`` once another worker has left one."""

    class Failing(Teacher):
        def forward(self, input_ids, attention_mask):
            if torch.equal(input_ids[0], record):
                while not [file for file in folder.iterdir() if not file.name.startswith(f"{os.getpid()}-")]:
                    time.sleep(0.01)
                (folder.parent / "failed").write_text(f"{os.getpid()}-")
                fail()
            logits = super().forward(input_ids, attention_mask)
            (folder / f"{os.getpid()}-{len(list(folder.iterdir()))}").touch()
            return logits

    folder.mkdir()
    return Failing


def test_a_teacher_that_raises_stops_the_others_and_nothing_is_done_twice(tmp_path, dataset):
    def fail():
        raise ArithmeticError("of this teacher")

    data, path = ids(48, 9), tmp_path / "ray"
    with pytest.raises(ArithmeticError, match="of this teacher"):
        by_ray(dataset(data), path, "topk", 2, failing(tmp_path / "done", data[5 * BATCH], fail))
    done = len(list((tmp_path / "done").iterdir()))
    assert by_ray(dataset(data), path, "topk", 1)[:2] == (12 - done, done)
    assert_same(path, data, "topk", tmp_path)


def test_a_worker_that_dies_does_not_take_the_others_with_it(tmp_path, cluster, dataset):
    data, path = ids(48, 9), tmp_path / "ray"
    with pytest.raises(cluster.exceptions.RayActorError, match="died"):
        by_ray(dataset(data), path, "sample", 2, failing(tmp_path / "done", data[5 * BATCH], lambda: os._exit(1)))
    dead = (tmp_path / "failed").read_text()
    done = len([file for file in (tmp_path / "done").iterdir() if not file.name.startswith(dead)])
    assert done
    assert by_ray(dataset(data), path, "sample", 2)[:2] == (12 - done, done)
    assert_same(path, data, "sample", tmp_path)


def test_a_worker_that_cannot_begin_does_not_keep_the_others_waiting(tmp_path, dataset):
    busy = kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, teacher="t", writer="1of2", **CODECS["topk"])
    with busy, pytest.raises(CacheBusyError, match="1of2"):
        by_ray(dataset(ids(8, 9)), tmp_path, "topk", 2)


def test_no_batch_spans_two_blocks(cluster):
    """Numbers come as tensors, names and rows of several lengths as lists."""
    from kdfast.cache.capture.ray_worker import Tensors, batches_of

    items = [{"name": f"r{i}", "x": np.full(2, i), "ragged": np.arange(i), "real": i % 2 == 0} for i in range(8)]
    data = cluster.data.from_items(items, override_num_blocks=2)
    got = list(Tensors(batches_of(data.iterator(), 3)))
    assert [batch["name"] for batch in got] == [["r0", "r1", "r2"], ["r3"], ["r4", "r5", "r6"], ["r7"]]
    assert [batch["x"].tolist() for batch in got[:2]] == [[[0, 0], [1, 1], [2, 2]], [[3, 3]]]
    assert [ids.tolist() for ids in got[2]["ragged"]] == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert got[0]["real"].dtype == torch.bool


def test_waiting_for_a_batch_ends_when_it_is_stopped_or_fails():
    from kdfast.cache.capture.ray_worker import Stoppable

    stopped, never = threading.Event(), threading.Event()

    def stuck():
        yield 1
        stopped.set()
        never.wait()
        yield 2

    def failing():
        yield 1
        raise OSError("of the disk")

    assert list(Stoppable(stuck(), stopped)) in ([], [1])
    never.set()
    with pytest.raises(OSError, match="of the disk"):
        list(Stoppable(failing(), threading.Event()))
    assert list(Stoppable(iter([1, 2, 3]), threading.Event())) == [1, 2, 3]


def test_writers_of_a_url_are_named_by_their_node(tmp_path):
    from kdfast.cache.capture.ray_worker import _writer_name

    assert _writer_name(str(tmp_path), Ranks(1, 2)) == _writer_name(f"file://{tmp_path}", Ranks(1, 2)) == "1of2"
    assert re.fullmatch("1of2_[A-Za-z0-9_]+", _writer_name("memory://cache", Ranks(1, 2)))


def test_a_path_is_the_same_on_every_worker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [module._everywhere(path) for path in ("labels", "memory://labels")] == [
        str(tmp_path / "labels"),
        "memory://labels",
    ]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers must be a positive int, got 0"),
        ({"workers": True}, ValueError, "workers must be a positive int, got True"),
        ({"batch_size": 2.0}, ValueError, r"batch_size must be a positive int, got 2\.0"),
        ({"dataset": [1]}, TypeError, r"dataset must be a ray\.data\.Dataset, got a list"),
        ({"make_teacher": Teacher()}, TypeError, "make_teacher must be a function .*, got a Teacher"),
        ({"make_teacher": "t"}, TypeError, "make_teacher must be a function .*, got a str"),
        ({"writer": "a"}, ValueError, "ray_capture gives each worker its writer, got 'a'"),
        ({"progress": True}, ValueError, "ray_capture gives each worker its progress, got True"),
        ({"num_cpus": 1}, UserWarning, "the workers take 2 of the cluster's 2 CPUs: the dataset needs one"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(tmp_path, cluster, wrong, error, message):
    data = cluster.data.range(8)
    right = {"make_teacher": Teacher, "dataset": data, "workers": 2, "batch_size": 2, "vocab_size": VOCAB}
    with pytest.raises(error, match=message):
        ray_capture(path=tmp_path / "ray", **{**right, **wrong})
    assert not (tmp_path / "ray").exists()


def test_without_ray_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CacheError, match=r"pip install \"kdfast\[ray\]\""):
        ray_capture(Teacher, None, tmp_path, workers=1, batch_size=1, vocab_size=VOCAB)


def test_ray_is_imported_by_who_uses_it():
    code = "import sys, kdfast, kdfast.cache; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
