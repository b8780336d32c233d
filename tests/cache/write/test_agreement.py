"""What a cache is: decided by its first writer, compared by the others when they open it, and found where it lies."""

import json
import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

import kdfast.cache
from kdfast import SoftLabels
from kdfast._paths import local_path
from kdfast.cache import CacheCorruptError, CacheError, CacheMismatchError, capture
from kdfast.cache.format.declared import DECLARATION
from kdfast.cache.format.keys import make_key
from kdfast.labels.head import OutputLayer
from support.caches import VOCAB, contents, logits, write, writer
from support.children import Teacher, batches, gather_there

OTHERS = {
    "teacher": {"teacher": "u"},
    "k": {"k": 5},
    "codec": {"codec": "dense", "k": None},
    "vocab_size": {"vocab_size": 12},
    "temperatures": {"temperatures": (1.0, 2.0)},
    "keys": {"keys": "range"},
}


def other(path, name, **options):
    chosen = {key: value for key, value in {"k": 4, **OTHERS[name]}.items() if value is not None}
    return kdfast.cache.Writer(path, **{"vocab_size": VOCAB, "codec": "topk", "teacher": "t", **chosen, **options})


# ---- decided when the first writer opens ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_a_second_writer_with_other_options_is_refused_when_it_opens(tmp_path, name):
    with writer(tmp_path):
        for again in ("1", "2"):
            with pytest.raises(CacheMismatchError, match=rf"this writer has .*{DECLARATION} has") as caught:
                other(tmp_path, name, writer=again)
            wanted = "config" if name == "k" else name
            assert f"{wanted}=" in str(caught.value)
        with writer(tmp_path, writer="3") as same:
            same.add(1, logits(1))
    assert not list(tmp_path.glob("*.journal"))


def test_a_declaration_binds_as_long_as_somebody_relies_on_it(tmp_path):
    """A writer that has stored nothing leaves the directory free; what a killed one has left does not."""
    with writer(tmp_path):
        pass
    assert contents(tmp_path) == {}
    with other(tmp_path, "k"):
        assert (tmp_path / DECLARATION).exists()
    with writer(tmp_path) as first:
        first.add(0, logits(1))
    with pytest.raises(CacheMismatchError):
        other(tmp_path, "k")


def test_a_declaration_of_writers_that_were_killed_at_once_does_not_bind(tmp_path):
    """Eight ranks began with the wrong option, and were killed before they had anything."""
    with writer(tmp_path):
        stale = (tmp_path / DECLARATION).read_bytes()
    (tmp_path / DECLARATION).write_bytes(stale)
    for rank in range(8):
        (tmp_path / f"shard-{rank}.journal").write_bytes(b"")
    with other(tmp_path, "k", writer="0") as first, other(tmp_path, "k", writer="1") as second:
        first.add(0, logits(1))
        second.add(1, logits(1))
    assert len(kdfast.cache.open(tmp_path)) == 2
    assert json.loads((tmp_path / DECLARATION).read_bytes())["codec_config"] == '{"k":5,"value_dtype":"float16"}'


def test_a_cache_without_a_declaration_is_gone_on_with(tmp_path):
    write(tmp_path, range(5))
    declared = (tmp_path / DECLARATION).read_bytes()
    (tmp_path / DECLARATION).unlink()
    assert len(kdfast.cache.open(tmp_path)) == 5
    with pytest.raises(CacheMismatchError, match=r"but .*shard-0-00000.safetensors has teacher='t'"):
        write(tmp_path, range(5), teacher="u")
    assert not (tmp_path / DECLARATION).exists()
    write(tmp_path, range(9))
    assert (tmp_path / DECLARATION).read_bytes() == declared


def test_a_remote_cache_is_declared_too(tmp_path):
    url = "memory://kdfast-agreement"
    try:
        first = writer(url, staging=tmp_path)
        with first, pytest.raises(CacheMismatchError, match=f"{url}/{DECLARATION} has teacher='t'"):
            other(url, "teacher", writer="1", staging=tmp_path)
        files = fsspec.filesystem("memory")
        whole = files.cat_file(f"/kdfast-agreement/{DECLARATION}")
        files.pipe_file(f"/kdfast-agreement/{DECLARATION}", whole[:50])  # an upload that broke off
        write(url, range(5), staging=tmp_path)
        assert files.cat_file(f"/kdfast-agreement/{DECLARATION}") == whole
    finally:
        fsspec.filesystem("memory").rm("/kdfast-agreement", recursive=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 3}', '{"format": "kdfast-cache"}', "[" * 10**5])
def test_a_declaration_that_cannot_be_read_is_named(tmp_path, text):
    write(tmp_path, range(5))
    (tmp_path / DECLARATION).write_text(text)
    assert len(kdfast.cache.open(tmp_path)) == 5
    with pytest.raises(CacheError, match=f"{tmp_path}/{DECLARATION}: "):
        write(tmp_path, range(9))


def test_a_declaration_of_another_version_is_named(tmp_path):
    write(tmp_path, range(5))
    declared = json.loads((tmp_path / DECLARATION).read_bytes())
    (tmp_path / DECLARATION).write_text(json.dumps({**declared, "version": "2"}))
    with pytest.raises(CacheError, match="has format version 2"):
        write(tmp_path, range(9))
    with pytest.raises(CacheError) as caught:
        write(tmp_path, range(9))
    assert not isinstance(caught.value, CacheCorruptError)


def test_two_who_learn_prototypes_at_once_agree_on_one_table(tmp_path, monkeypatch):
    """The second learns while the first does, from other rows, and finds the first one's table when it is done."""
    begun = []

    def rows(other):
        for number, batch in enumerate(batches()):
            if other and number == 1:  # the first one is learning
                begun.append(1)
                run("other", rows(other=False))
            yield batch

    def run(name, loader):
        options = {"codec": "prototype", "k": 2, "prototypes": 2, "writer": name}
        return capture(Teacher(), loader, tmp_path, vocab_size=VOCAB, progress=False, **options)

    run("first", rows(other=True))
    assert begun
    cache = kdfast.cache.open(tmp_path)
    cache.verify()
    assert cache.info.shards >= 1
    assert (tmp_path / "shapes.txt").read_text().strip() in contents(tmp_path)


# ---- what the cache knows of the labels -----------------------------------------------------------------------------


def test_duplicates_are_counted_and_other_targets_named(tmp_path):
    with writer(tmp_path, block_rows=2) as w:
        for i in range(8):
            w.add(i, logits(2, seed=i), targets=torch.tensor([i, 3]))
        w.add(0, logits(2), targets=torch.tensor([0, 3]))
        with pytest.warns(UserWarning, match="1 is there already, with other targets: two samples have one key"):
            w.add(1, logits(2), targets=torch.tensor([2, 3]))
        for i in range(2, 8):
            w.add(i, logits(2), targets=torch.tensor([0, 0]))
        w.skip(3, torch.tensor([3, 3]))
        w.skip(4)
        with pytest.raises(KeyError, match="'new' has not been written"):
            w.skip("new")
        assert w.report == (8, 16, 10, 7, ("1", "2", "3", "4", "5"))


@pytest.mark.parametrize("how", ["sealed", "blocks", "parked"])
def test_targets_of_earlier_sessions_are_compared(tmp_path, how):
    rows = 1 if how == "blocks" else 100

    def first():
        with writer(tmp_path, block_rows=rows) as w:
            w.add(0, logits(2), targets=torch.tensor([1, 2]))
            w.add(1, logits(1), targets=torch.tensor([5]))
            if how != "sealed":
                raise ZeroDivisionError

    if how == "sealed":
        first()
    else:
        with pytest.raises(ZeroDivisionError):
            first()
    with writer(tmp_path, block_rows=rows) as w:
        w.add(0, logits(2), targets=torch.tensor([1, 2]))
        assert w.report.conflicts == 0
        with pytest.warns(UserWarning, match="with other targets"):
            w.add(1, logits(1), targets=torch.tensor([6]))
        assert w.report[2:] == (2, 1, ("1",))


def test_hidden_labels_bring_their_own_head_and_no_other(tmp_path):
    right, wrong = (OutputLayer(torch.randn(VOCAB, 4)) for _ in range(2))
    states = torch.randn(3, 4).bfloat16()

    made = SoftLabels.from_fields({"kind": "hidden", "vocab_size": VOCAB, "temperatures": (1.0,), "values": states})
    options = {"vocab_size": VOCAB, "codec": "hidden", "width": 4, "head": right.fingerprint}
    with kdfast.cache.Writer(tmp_path, **options) as w:
        with pytest.raises(ValueError, match=rf"'a': .* head {right.fingerprint}, but these .* {wrong.fingerprint}"):
            w.add_labels("a", replace(made, head=wrong))
        w.add_labels("a", replace(made, head=right))
        w.add_labels("b", made)
    assert len(kdfast.cache.open(tmp_path)) == 2


# ---- paths ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A function that changes the working directory, as Hydra does."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    return lambda: os.chdir(tmp_path / "run")


def test_a_writer_and_a_reader_stay_where_they_were_opened(tmp_path, elsewhere):
    w = writer("cache", block_rows=1, shard_bytes=1)
    with w:
        w.add(0, logits(1))
        elsewhere()
        for i in range(1, 4):
            w.add(i, logits(1))
    os.chdir(tmp_path)
    cache = kdfast.cache.open("cache")
    elsewhere()
    assert len(cache.gather(range(4))) == 4
    cache.verify()
    packed = pickle.loads(pickle.dumps(cache)).pack(range(4))
    assert len(packed.unpack()) == 4
    assert not list((tmp_path / "run").iterdir())


def test_spawned_workers_find_a_cache_by_a_relative_path(tmp_path, elsewhere):
    write("cache", range(4))
    cache = kdfast.cache.open("cache")
    elsewhere()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kdfast.cache"])
    queue = context.Queue()
    process = context.Process(target=gather_there, args=(pickle.dumps(cache), "/", range(4), queue))
    process.start()
    rows = queue.get(timeout=300)
    process.join()
    assert rows == len(cache.gather(range(4)))


def test_what_is_no_local_path_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("memory://cache", Path("s3://bucket/run")):
        with pytest.raises(ValueError, match="is a URL, and this has to be a local path"):
            local_path(path)
    with pytest.raises(ValueError, match=r"~nobody-of-this-name/cache: ~nobody-of-this-name is nobody's home"):
        kdfast.cache.open("~nobody-of-this-name/cache")
    with pytest.raises(TypeError, match=r"a text or a Path, got b'cache'"):
        kdfast.cache.open(b"cache")
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write("~/cache", range(3))
    write(f"file://{tmp_path}/home/cache", range(6))
    assert list(kdfast.cache.open("~/cache")) == [make_key(i) for i in range(6)]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert kdfast.cache.salvage("~/cache") == 0
