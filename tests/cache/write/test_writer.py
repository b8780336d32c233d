"""What the writer stores beside labels, what it does in the background, and where it may write."""

import errno
import gc
import json
import multiprocessing
import os
import shutil
import threading

import fsspec
import numpy as np
import pytest
import torch
from safetensors import safe_open

import kdfast.cache
from kdfast._C import crc32c
from kdfast.cache import codecs
from kdfast.cache.format.container import read_container
from kdfast.cache.format.keys import make_key
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.storage import LocalStorage, open_storage
from kdfast.cache.format.view import View, pack_views, unpack_views
from support.caches import VOCAB, Toy, contents, logits, record, write, writer
from support.children import write_as

NAME = "shard-0-00000.safetensors"


def toy(path, **options):
    return kdfast.cache.Writer(path, **{"vocab_size": VOCAB, "codec": "toy", **options})


def tensors(path):
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


# ---- targets, views, vocabulary -----------------------------------------------------------------------------------


def test_targets_leave_a_checksum_and_the_teachers_loss(tmp_path):
    rows, targets = [logits(4, seed=i) for i in range(3)], torch.tensor([[1, -100, 3, 10], [0, -1, -1, 2], [-1] * 4])
    with writer(tmp_path, block_rows=5) as w:
        for i in range(3):
            w.add(i, rows[i].bfloat16().float(), targets=targets[i].to(torch.int32 if i else torch.int64))
    stored, metadata = tensors(tmp_path / NAME)
    assert stored["record_targets"].dtype == np.uint32
    words = np.array([[1, 2**32 - 1, 3, 10], [0, 2**32 - 1, 2**32 - 1, 2], [2**32 - 1] * 4], "<u4")
    assert stored["record_targets"].tolist() == [crc32c(row.tobytes()) for row in words]
    canary = json.loads(metadata["targets"])
    losses = torch.nn.functional.cross_entropy(
        torch.cat(rows).bfloat16().double(), targets.flatten().clamp(min=-1), ignore_index=-1, reduction="sum"
    )
    assert canary["count"] == 5
    assert canary["cross_entropy_sum"] == pytest.approx(float(losses), rel=1e-6)  # of float32 log-sum-exps


def test_a_target_that_the_teacher_rules_out_leaves_the_loss_finite(tmp_path):
    row = torch.tensor([0.0, 0.0, *[-torch.inf] * 9])
    with writer(tmp_path) as w:
        w.add(0, row.expand(2, -1), targets=torch.tensor([1, 5]))
        w.add(1, row, targets=torch.tensor(0))
    canary = json.loads(tensors(tmp_path / NAME)[1]["targets"])
    assert canary == {"cross_entropy_sum": pytest.approx(2 * np.log(2)), "count": 2}


def test_nothing_optional_is_stored_unless_it_is_there(tmp_path):
    with writer(tmp_path) as w:
        w.add(0, logits(1))
    stored, metadata = tensors(tmp_path / NAME)
    assert not {"record_targets", "row_views", "codec_model"} & set(stored)
    assert "targets" not in metadata


VIEWS = [
    View(),
    View(crop=(0.0, 1.0, 0.25, 1 / 3), flip=True, seed=2**32 - 1),
    View(crop=(0, 0, 0, 0)),
    View(flip=True, seed=7),
]


def test_views_come_back_exactly(tmp_path):
    with writer(tmp_path) as w:
        w.add(0, logits(3), views=VIEWS[:3])
        w.add(1, logits(1), views=tuple(VIEWS[3:]))
    stored = tensors(tmp_path / NAME)[0]["row_views"]
    assert stored.shape == (4, 13)
    assert unpack_views(stored) == VIEWS
    assert np.array_equal(pack_views(unpack_views(stored)), stored)
    assert stored[1].tobytes().hex() == "0000" + "ffff" + "0040" + "5555" + "ffffffff" + "03"
    parts = View(crop=(0.2, 0.3, 0.4, 0.5)).crop
    assert all(part * 65535 == round(part * 65535) for part in parts)
    assert View(crop=parts).crop == parts


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seed": -1}, "seed must lie"),
        ({"seed": 2**32}, "seed must lie"),
        ({"crop": (0, 0, 1.1, 1)}, "fractions 0"),
        ({"crop": (0, 0, 1)}, "fractions 0"),
        ({"crop": (0, float("nan"), 1, 1)}, "fractions 0"),
    ],
)
def test_bad_views_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        View(**bad)


def test_bytes_that_are_no_view_are_named():
    packed = pack_views(VIEWS)
    for row, place, byte in [(3, 12, 4), (0, 0, 1)]:
        bad = packed.copy()
        bad[row, place] = byte
        with pytest.raises(ValueError, match=f"row {row} is not one"):
            unpack_views(bad)


@pytest.mark.parametrize(
    ("extras", "error", "message"),
    [
        ({"targets": torch.zeros(2)}, TypeError, "'a': targets must be an integer tensor, got torch.float32"),
        ({"targets": [0, 0]}, TypeError, "got list"),
        ({"targets": torch.tensor([True, True])}, TypeError, "got torch.bool"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"must be \(2,\), one per row, got \(3,\)"),
        ({"targets": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, r"got \(1, 2\)"),
        ({"targets": torch.tensor([0, VOCAB])}, ValueError, "'a': targets must lie below vocab_size 11, got 11"),
        ({"views": [View()]}, ValueError, "'a': views must be one per row, 2, got 1"),
        ({"views": [View(), 3]}, TypeError, r"must be kdfast.cache.View, got int"),
    ],
)
def test_bad_extras_are_named_and_the_rest_goes_on(tmp_path, extras, error, message):
    with writer(tmp_path) as w:
        with pytest.raises(error, match=message):
            w.add("a", logits(2), **extras)
        w.add("a", logits(2))
    assert len(kdfast.cache.open(tmp_path)["a"]) == 2


@pytest.mark.parametrize("extras", [{"targets": torch.tensor([1])}, {"views": [View()]}])
def test_all_records_have_them_or_none(tmp_path, extras):
    with writer(tmp_path) as w:
        w.add("a", logits(1))
        with pytest.raises(ValueError, match=f"'b': it has {next(iter(extras))}, unlike the records before it"):
            w.add("b", logits(1), **extras)
    with writer(tmp_path) as w:  # another shard
        w.add("b", logits(1), **extras)
        with pytest.raises(ValueError, match=f"'c': it lacks {next(iter(extras))}"):
            w.add("c", logits(1))
    assert len(kdfast.cache.open(tmp_path)) == 2


def test_a_wider_teacher_is_cut(tmp_path):
    wide = torch.cat([logits(6), torch.full((6, 5), 30.0)], 1)
    wide[0, VOCAB:] = torch.nan
    targets = torch.arange(6)
    with writer(tmp_path / "wide", teacher_vocab_size=VOCAB + 5) as w:
        w.add("a", wide, targets=targets)
        for width in (VOCAB, VOCAB + 4):
            with pytest.raises(ValueError, match=rf"logits must be \(rows, 16\) or \(16,\), got \(6, {width}\)"):
                w.add("b", wide[:, :width], targets=targets)
    with writer(tmp_path / "cut") as w:
        w.add("a", logits(6), targets=targets)
    assert contents(tmp_path / "wide") == contents(tmp_path / "cut")
    with pytest.raises(ValueError, match="teacher_vocab_size must be at least vocab_size 11, got 10"):
        writer(tmp_path / "no", teacher_vocab_size=10)


# ---- labels selected before ---------------------------------------------------------------------------------------


def parts_of(path):
    """The metadata and the tensors of a shard."""
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("codec", [{}, {"codec": "dense", "k": None}])
def test_labels_go_from_one_cache_into_another(tmp_path, codec):
    options = {name: value for name, value in codec.items() if value is not None}
    make = (lambda path: kdfast.cache.Writer(path, vocab_size=VOCAB, **options)) if codec else writer
    with make(tmp_path / "a") as w:
        for i in range(5):
            w.add(i, logits(i, seed=i))
    cache = kdfast.cache.open(tmp_path / "a")
    with make(tmp_path / "b") as w:
        for key in cache:
            w.add_labels(key, cache[key])
        w.add_labels(3, cache[3])
        assert (w.records, w.duplicates) == (5, 1)
    copy = kdfast.cache.open(tmp_path / "b")
    assert list(copy) == list(cache)
    torch.testing.assert_close(copy.gather(range(5)).values, cache.gather(range(5)).values)
    if not codec:
        (old, kept), (new, got) = (parts_of(tmp_path / x / "shard-0-00000.safetensors") for x in "ab")
        assert old.pop("floor")  # which add alone can measure
        assert old == new
        assert kept.keys() == got.keys()
        assert all(np.array_equal(kept[name], got[name]) for name in kept if name != "seal")


def test_labels_that_the_codec_does_not_store_are_named(tmp_path):
    def labels(k=4, **changes):
        options = {"vocab_size": VOCAB, "temperatures": (1.0,), **changes}
        tails = torch.zeros(len(options["temperatures"]), 2)
        return kdfast.SoftLabels.topk(torch.arange(k).expand(2, k), torch.full((2, k), -2.0), tails, **options)

    bad = [
        (logits(2), TypeError, "'a': labels must be SoftLabels, got Tensor"),
        (kdfast.SoftLabels.dense(logits(2)), ValueError, "'a': codec 'topk' stores labels of kind 'topk', got 'dense'"),
        (labels(vocab_size=12), ValueError, "of vocab_size 11, got 12"),
        (labels(temperatures=(1.0, 2.0)), ValueError, r"of temperatures \(1.0,\), got \(1.0, 2.0\)"),
        (labels(present=torch.tensor([True, False])), ValueError, "must have all rows present"),
        (labels(k=5), ValueError, "'a': "),
    ]
    with writer(tmp_path) as w:
        for value, error, message in bad:
            with pytest.raises(error, match=message):
                w.add_labels("a", value)
        w.add_labels("a", labels(present=torch.tensor([True, True])), targets=torch.tensor([1, 2]))
    assert len(kdfast.cache.open(tmp_path)["a"]) == 2
    assert json.loads(tensors(tmp_path / NAME)[1]["targets"])["count"] == 0


# ---- models and assets --------------------------------------------------------------------------------------------


@codecs.register
class Remembering(Toy):
    """Remembers what it has learned from."""

    name = "remembering toy"
    seen = []  # noqa: RUF012

    def learn(self, labels):
        self.seen.append(labels)
        return b"m%d" % len(labels)


def test_a_model_is_learned_once_from_the_first_rows(tmp_path):
    options = {"codec": Remembering.name, "learn_rows": 10, "block_rows": 4}
    with toy(tmp_path, shard_bytes=600, **options) as w:
        for i in range(30):
            w.add(i, logits(3, seed=i))
    with toy(tmp_path, **options) as w:
        w.add(99, logits(3))
    seen = Remembering.seen
    assert torch.equal(torch.cat([part.values for part in seen]), torch.cat([logits(3, seed=i) for i in range(4)]))
    shards = sorted(tmp_path.glob("shard-*.safetensors"))
    assert len(shards) > 3
    assert {tensors(shard)[0]["codec_model"].tobytes() for shard in shards} == {b"m12"}


def test_few_rows_are_learned_from_at_the_end(tmp_path):
    with toy(tmp_path, learn_rows=1000) as w:
        w.add("empty", logits(0))
        w.add("a", logits(3))
        assert w.durable_records == 0
    assert tensors(tmp_path / NAME)[0]["codec_model"].tobytes() == logits(3).sum(0).numpy().tobytes()
    with toy(tmp_path, learn_rows=1000, writer="1") as w:
        w.add("empty too", logits(0))
    assert len(kdfast.cache.open(tmp_path)) == 3


def test_assets_lie_beside_the_shards(tmp_path):
    with toy(tmp_path, table="abc") as w:
        assert list(tmp_path.glob("*.bin")) == []
        w.add(0, logits(1))
    assert (tmp_path / "toy-table.bin").read_bytes() == b"abc"
    (tmp_path / "toy-table.bin").write_bytes(b"abd")
    with pytest.raises(kdfast.cache.CacheMismatchError, match=r"toy-table.bin is not the asset that codec toy has"):
        toy(tmp_path, table="abc")
    (tmp_path / "toy-table.bin").unlink()
    with toy(tmp_path, table="abc") as w:  # the lock was given back
        w.add(1, logits(1))
    assert (tmp_path / "toy-table.bin").read_bytes() == b"abc"


# ---- the file -----------------------------------------------------------------------------------------------------


def test_every_bit_flip_of_a_shard_with_everything_is_detected(tmp_path):
    with toy(tmp_path, learn_rows=2, block_rows=4) as w:
        for i in (1, 2):
            key, rows, extras = record(i)
            w.add(key, rows[:2], **{name: part[:2] for name, part in extras.items()})
    shard = tmp_path / NAME
    good = shard.read_bytes()
    assert set(read_container(shard).tables) >= {"record_targets", "row_views", "codec_model"}
    Shard(shard).verify()
    with shard.open("r+b", buffering=0) as file:
        for position in range(len(good)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([good[position] ^ 1 << bit]), position)
                with pytest.raises(kdfast.cache.CacheCorruptError):
                    Shard(shard).block(0)
            os.pwrite(file.fileno(), good[position : position + 1], position)
    assert shard.read_bytes() == good


def test_blocks_are_on_disk_long_before_the_seal(tmp_path):
    with writer(tmp_path, block_rows=4) as w:
        for i in range(10):
            w.add(i, logits(2, seed=i))
        w._thread.drain()
        assert w.durable_records == 10
        w.add(10, logits(1))
        w._thread.drain()
        assert w.durable_records == 10
        assert (tmp_path / f"{NAME}.part").stat().st_size > 10 * 2 * 20
        assert len(w._builder.pending) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache.json", "index.safetensors", "manifest.json", NAME]
    with writer(tmp_path) as w:
        assert w.durable_records == 11


def test_empty_records_do_not_pile_up(tmp_path):
    with writer(tmp_path, block_rows=8) as w:
        for i in range(20):
            w.add(i, logits(0))
        w._thread.drain()
        assert w.durable_records == 16
    cache = kdfast.cache.open(tmp_path)
    assert (len(cache), cache.info.rows) == (20, 0)


# ---- the background -----------------------------------------------------------------------------------------------


def test_a_teacher_may_reuse_its_memory(tmp_path):
    with toy(tmp_path) as w:
        buffer = logits(2)
        w.add("a", buffer)
        w.add("row", buffer[0])
        buffer.zero_()
        labels = kdfast.SoftLabels.dense(logits(2))
        w.add_labels("b", labels)
        labels.values.zero_()
    cache = kdfast.cache.open(tmp_path)
    for key in "ab":
        assert torch.equal(cache[key].values, logits(2))
    assert torch.equal(cache["row"].values, logits(2)[:1])


@codecs.register
class Waiting(Toy):
    """Encodes nothing before it is told to."""

    name = "waiting toy"
    entered, go = threading.Event(), threading.Event()

    def encode(self, labels):
        self.entered.set()
        self.go.wait()
        return super().encode(labels)


def test_the_queue_is_bounded(tmp_path):
    added = []

    def produce(w):
        for i in range(100):
            w.add(i, logits(1))
            added.append(i)

    with toy(tmp_path, codec=Waiting.name, block_rows=4) as w:
        thread = threading.Thread(target=produce, args=(w,))
        thread.start()
        Waiting.entered.wait()
        thread.join(0.3)  # far longer than it needs to fill the queue
        assert len(added) <= 4 + 8 * 4
        Waiting.go.set()
        thread.join()
    assert len(added) == 100


class Broken(Exception):
    pass


@codecs.register
class Failing(Toy):
    """Encodes once it has been mended."""

    name = "failing toy"
    mended = False

    def encode(self, labels):
        if not self.mended:
            raise Broken("the codec")
        return super().encode(labels)


def test_an_error_of_the_thread_is_raised_as_it_is_and_tried_again(tmp_path):
    w = toy(tmp_path, codec=Failing.name, block_rows=1)
    w.add(0, logits(1))
    for again in (w._thread.drain, w._thread.drain, lambda: w.add(1, logits(1)), w.close, w.close):
        with pytest.raises(Broken, match="the codec"):
            again()
    w.codec.mended = True
    w.add(2, logits(1))
    w.close()
    assert list(kdfast.cache.open(tmp_path)) == [make_key(0), make_key(2)]


def full_disk(monkeypatch, calls):
    """Every ``pwrite`` after ``calls`` of them writes half of what it should, or nothing."""
    real, made = os.pwrite, []

    def pwrite(descriptor, data, offset):
        made.append(offset)
        if len(made) == calls:
            return real(descriptor, bytes(data)[: len(data) // 2], offset)
        if len(made) > calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 10, 20, 30])
def test_a_full_disk_loses_nothing(tmp_path, calls):
    with writer(tmp_path / "whole", block_rows=4, shard_bytes=500) as w:
        for i in range(30):
            w.add(i, logits(2, seed=i))
    w = writer(tmp_path / "full", block_rows=4, shard_bytes=500)

    def fill():
        for i in range(30):
            if i not in w:
                w.add(i, logits(2, seed=i))
        w.close()

    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, calls)
        for _ in range(3):
            with pytest.raises(OSError, match=r"No space left on device: .*shard-0"):
                fill()
    fill()
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_what_cannot_even_be_noted_is_warned_of(tmp_path):
    def teacher(w):
        with w:
            w.add(0, logits(1))
            raise ZeroDivisionError

    w = writer(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, 1)
        with (
            pytest.raises(ZeroDivisionError),
            pytest.warns(UserWarning, match="1 records could not be kept: .*No space"),
        ):
            teacher(w)
    with writer(tmp_path) as w:
        assert 0 not in w


def drop(things):
    things.clear()
    gc.collect()


def test_a_directory_that_vanishes_is_named(tmp_path):
    w = writer(tmp_path / "gone", block_rows=1)
    w.add(0, logits(1))
    w._thread.drain()
    shutil.rmtree(tmp_path / "gone")
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            w.close()
    kept = [w]
    del w
    with pytest.warns(ResourceWarning, match="gone was not closed"):
        drop(kept)


def test_a_directory_without_permission_is_named(tmp_path, monkeypatch):
    real = os.open

    def denied(path, *args, **keywords):
        if str(path).endswith(".part"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **keywords)

    w = writer(tmp_path, block_rows=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        w.add(0, logits(1))
        with pytest.raises(PermissionError, match="shard-0-00000"):
            w.close()
    w.close()
    assert len(kdfast.cache.open(tmp_path)) == 1


# ---- several writers, and other places ------------------------------------------------------------------------------


def test_four_writers_need_no_coordinator(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kdfast.cache"])
    start = context.Barrier(4)
    processes = [context.Process(target=write_as, args=(tmp_path, str(name), start)) for name in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = kdfast.cache.open(tmp_path)
    cache.verify()
    assert len(cache) == 120
    listed = json.loads((tmp_path / "manifest.json").read_bytes())["shards"]
    assert [entry["name"] for entry in listed] == sorted(p.name for p in tmp_path.glob("shard-*.safetensors"))


def test_the_last_manifest_lists_every_shard(tmp_path, monkeypatch):
    """Another writer seals a shard and lists it just before this one writes a list without it."""
    real, others = LocalStorage.publish, [1]

    def publish(self, name, chunks):
        if others:
            write(tmp_path, range(5), writer=str(others.pop()))
        real(self, name, chunks)

    monkeypatch.setattr(LocalStorage, "publish", publish)
    write(tmp_path, range(10, 15))
    listed = json.loads((tmp_path / "manifest.json").read_bytes())["shards"]
    assert [entry["name"] for entry in listed] == [NAME, NAME.replace("-0-", "-1-")]


def test_a_forked_process_neither_writes_nor_holds_the_lock(tmp_path):
    w = writer(tmp_path)
    w.add(0, logits(1))
    child = os.fork()
    if not child:
        try:
            w.add(1, logits(1))
        except kdfast.cache.CacheError:
            w.close()
            os._exit(7 if w._session._journal._descriptor < 0 else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    w.close()
    assert len(kdfast.cache.open(tmp_path)) == 1


@pytest.fixture
def memory():
    url = "memory://kdfast-test"
    fsspec.filesystem("memory").makedirs("/kdfast-test", exist_ok=True)
    yield url
    clear()


def clear():
    fsspec.filesystem("memory").rm("/kdfast-test", recursive=True)


def download(url, path):
    fs = fsspec.filesystem("memory")
    path.mkdir()
    for name in fs.ls("/kdfast-test", detail=False):
        (path / name.rsplit("/", 1)[-1]).write_bytes(fs.cat_file(name))
    return contents(path)


def test_a_remote_cache_has_the_same_files(tmp_path, memory):
    for codec in ("topk", "toy"):
        write(tmp_path / codec, range(60), codec)
        write(memory, range(30), codec, staging=tmp_path / "staging")
        write(memory, range(60), codec, staging=tmp_path / "staging")
        got = download(memory, tmp_path / f"{codec}-remote")
        assert set(got) >= {NAME, "manifest.json"}
        cache = kdfast.cache.open(tmp_path / f"{codec}-remote")
        cache.verify()
        assert list(cache) == [make_key(i) for i in range(60)]
        assert list((tmp_path / "staging").iterdir()) == []
        clear()
        fsspec.filesystem("memory").makedirs("/kdfast-test")


def test_a_remote_writer_resumes_from_its_staging(tmp_path, memory):
    write(tmp_path / "whole", range(60))
    with pytest.raises(ZeroDivisionError):
        write(memory, range(60), staging=tmp_path / "staging", announce=lambda i: 1 // (40 - i))
    write(memory, range(60), staging=tmp_path / "staging")
    assert download(memory, tmp_path / "remote") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="staging is for URLs"):
        write(tmp_path / "whole", [], staging=tmp_path / "staging")


def test_a_failed_upload_is_tried_again(tmp_path, memory, monkeypatch):
    fs = fsspec.filesystem("memory")
    real = fs.put_file
    for after in (False, True):  # nothing arrived; or everything did, but not the answer

        def put_file(local, remote, after=after):
            if after:
                real(local, remote)
            raise OSError("connection lost")

        w = writer(f"{memory}/{after}", staging=tmp_path)
        w.add(0, logits(1))
        with monkeypatch.context() as patch:
            patch.setattr(fs, "put_file", put_file)
            with pytest.raises(OSError, match="connection lost"):
                w.close()
        w.close()
        assert fs.exists(f"/kdfast-test/{after}/{NAME}")
        assert fs.exists(f"/kdfast-test/{after}/manifest.json")


def test_a_corrupt_remote_shard_is_named(tmp_path, memory):
    fs = fsspec.filesystem("memory")
    write(memory, range(5), staging=tmp_path)
    good = fs.cat_file(f"/kdfast-test/{NAME}")
    for bad in (b"", good[:100], good[:-9] + b"x" + good[-8:], b"\xff" * len(good)):
        fs.pipe_file(f"/kdfast-test/{NAME}", bad)
        with pytest.raises(kdfast.cache.CacheCorruptError, match=f"memory://kdfast-test/{NAME}: "):
            write(memory, [], staging=tmp_path)


def test_storage_downloads_once_and_again_after_a_change(tmp_path, memory):
    write(memory, range(5), staging=tmp_path)
    storage = open_storage(memory, local=tmp_path / "local")
    path = storage.fetch(NAME)
    assert path.read_bytes() == storage.read_bytes(NAME)
    inode = path.stat().st_ino
    assert storage.fetch(NAME).stat().st_ino == inode
    changed = bytearray(storage.read_bytes(NAME))
    changed[-1] ^= 1  # another seal, the same size
    storage.publish(NAME, [bytes(changed)])
    assert storage.fetch(NAME).read_bytes() == changed
    assert storage.list() == ["cache.json", "index.safetensors", "manifest.json", NAME]


class UploadError(OSError):
    pass


def breaking(monkeypatch, call, share):
    """Uploads write a part of a file under its final name, and break off, from upload number ``call`` on."""
    fs = type(fsspec.filesystem("memory"))
    put, pipe, made = fs.put_file, fs.pipe_file, []

    def broken(self, path, data):
        made.append(path)
        if len(made) > call:
            pipe(self, path, data[: int(len(data) * share)])
            raise UploadError("connection lost")
        pipe(self, path, data)

    def put_file(self, local, remote, **options):
        with open(local, "rb") as file:
            broken(self, remote, file.read())

    monkeypatch.setattr(fs, "put_file", put_file)
    monkeypatch.setattr(fs, "pipe_file", lambda self, path, value, **options: broken(self, path, value))
    assert put is not put_file


@pytest.mark.parametrize("codec", ["topk", "toy"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_uploads_that_break_off_are_repeated_whoever_goes_on(tmp_path, memory, codec, share):
    """On a remote that shows a file before it is whole. Nobody has to delete anything."""
    write(tmp_path / "whole", range(20), codec)
    whole = contents(tmp_path / "whole")
    fs = fsspec.filesystem("memory")
    for call in range(len(whole) + 3):
        with pytest.MonkeyPatch.context() as patch:
            breaking(patch, call, share)
            try:
                write(memory, range(20), codec, staging=tmp_path / "staging")
            except UploadError:
                pass
            else:
                break
        if call % 2:
            kdfast.cache.salvage(memory, staging=tmp_path / "staging")
        write(memory, range(20), codec, staging=tmp_path / "staging")
        found = {path.rsplit("/", 1)[-1]: fs.cat_file(path) for path in fs.ls("/kdfast-test", detail=False)}
        if call % 2 == 0:
            assert found == whole, call
        cache = kdfast.cache.open(memory)
        cache.verify()
        assert list(cache) == [make_key(i) for i in range(20)]
        clear()
        fs.makedirs("/kdfast-test")
    assert call > 3


def test_a_broken_upload_that_is_repeated_in_the_same_process(tmp_path, memory):
    with pytest.MonkeyPatch.context() as patch:
        w = writer(memory, staging=tmp_path)
        w.add(0, logits(1))
        breaking(patch, 0, 0.5)
        with pytest.raises(UploadError):
            w.close()
    with pytest.raises(kdfast.cache.CacheCorruptError, match=f"memory://kdfast-test/{NAME}: "):
        writer(memory, writer="other", staging=tmp_path)
    w.close()
    assert len(kdfast.cache.open(memory)) == 1
