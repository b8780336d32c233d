"""Merging caches: records arrive as they are, whatever is interrupted, and nothing else does."""

import os
from pathlib import Path

import fsspec
import pytest
import torch
from typer.testing import CliRunner

import kdfast.cache
from kdfast.cache.tools.merge import merge
from kdfast.cli.app import app
from support.repack import repack

VOCAB = 11


def logits(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def fill(path, keys, seed=0, keys_="hash", **options):
    options["keys"] = keys_
    with kdfast.cache.Writer(path, **{"vocab_size": VOCAB, "codec": "topk", "k": 4, "teacher": "t", **options}) as w:
        for i, key in enumerate(keys):
            w.add(key, logits(i % 3 + 1, seed=seed + i))
    return path


def values(cache, key):
    return kdfast.cache.open(cache)[key].values


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_all_records_arrive_in_the_order_of_the_sources(tmp_path):
    a = fill(tmp_path / "a", range(8), shard_bytes=200, block_rows=2)
    b = fill(tmp_path / "b", range(8, 12), seed=50, writer="rank1")
    report = merge([b, a], tmp_path / "all")
    cache = kdfast.cache.open(tmp_path / "all")
    cache.verify()
    order = [kdfast.cache.format.keys.make_key(i) for i in [*range(8, 12), *range(8)]]
    assert list(cache) == order
    for i in range(12):
        assert torch.equal(cache[i].values, values(a if i < 8 else b, i))
    shards = len(list(a.glob("shard-*"))) + 1
    assert shards > 2
    assert (report.copied, report.present, report.records, report.duplicates) == (shards, 0, 12, 0)
    assert (tmp_path / "all" / "manifest.json").exists()


def test_the_first_of_equal_keys_stays_and_the_others_are_counted(tmp_path):
    a, b = fill(tmp_path / "a", ["x", "y"]), fill(tmp_path / "b", ["x", "z"], seed=50)
    assert not torch.equal(values(a, "x"), values(b, "x"))
    for sources, winner in [((a, b), a), ((b, a), b)]:
        report = merge(sources, tmp_path / winner.name.upper())
        assert (report.records, report.duplicates) == (3, 1)
        assert torch.equal(values(tmp_path / winner.name.upper(), "x"), values(winner, "x"))


def test_what_the_destination_holds_stays_first(tmp_path):
    a, b = fill(tmp_path / "a", ["x", "y"]), fill(tmp_path / "b", ["x", "z"], seed=50)
    before = values(a, "x")
    report = merge([b], a)
    assert (report.copied, report.records, report.duplicates) == (1, 3, 1)
    assert torch.equal(values(a, "x"), before)


def test_linked_shards_share_their_bytes(tmp_path):
    a = fill(tmp_path / "a", ["x"])
    merge([a], tmp_path / "copied")
    merge([a], tmp_path / "linked", link=True)
    (source,), (linked,), (copied,) = (p.glob("shard-*") for p in (a, tmp_path / "linked", tmp_path / "copied"))
    assert linked.samefile(source)
    assert not copied.samefile(source)
    assert copied.read_bytes() == source.read_bytes()
    assert torch.equal(values(tmp_path / "linked", "x"), values(a, "x"))


def test_a_second_run_copies_nothing_and_a_later_one_only_what_is_new(tmp_path):
    a, b = fill(tmp_path / "a", ["x"]), fill(tmp_path / "b", ["y"], seed=5)
    merge([a], tmp_path / "all")
    first = names(tmp_path / "all")
    again = merge([a], tmp_path / "all")
    assert (again.copied, again.present, again.duplicates, names(tmp_path / "all")) == (0, 1, 0, first)
    later = merge([b], tmp_path / "all")
    assert (later.copied, later.records) == (1, 2)
    both = merge([a, b], tmp_path / "all")
    assert (both.copied, both.present, both.duplicates) == (0, 2, 0)


def test_an_interrupted_merge_is_readable_and_completed_by_another(tmp_path, monkeypatch):
    a = fill(tmp_path / "a", range(9), shard_bytes=200, block_rows=2)
    shards = len(list(a.glob("shard-*")))
    assert shards > 2
    done = []

    def interrupt():
        done.append(None)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([a], tmp_path / "all", progress=interrupt)
    assert 0 < len(kdfast.cache.open(tmp_path / "all")) < 9
    with monkeypatch.context() as patch:  # ... nor does a full disk leave half a file
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            merge([a], tmp_path / "all")
    assert not [name for name in names(tmp_path / "all") if name.endswith(".part")]
    report = merge([a], tmp_path / "all")
    assert (report.present, report.copied, report.records, report.duplicates) == (2, shards - 2, 9, 0)
    kdfast.cache.open(tmp_path / "all").verify()


def test_integer_keys_stay_integers(tmp_path):
    a, b = fill(tmp_path / "a", range(4), keys_="range"), fill(tmp_path / "b", range(2, 7), seed=50, keys_="range")
    report = merge([a, b], tmp_path / "all")
    cache = kdfast.cache.open(tmp_path / "all")
    assert sorted(cache) == list(range(7))
    assert (report.records, report.duplicates) == (7, 2)
    for i in range(7):
        assert torch.equal(cache[i].values, values(a if i < 4 else b, i))
    with pytest.raises(kdfast.cache.CacheMismatchError, match="keys='hash'"):
        merge([a, fill(tmp_path / "c", range(4))], tmp_path / "mixed")


@pytest.mark.parametrize("change", [{"teacher": "u"}, {"k": 5}, {"temperatures": (1.0, 2.0)}])
def test_caches_of_two_kinds_are_refused_by_name(tmp_path, change):
    a, b = fill(tmp_path / "a", ["x"]), fill(tmp_path / "b", ["y"], **change)
    field = "config" if "k" in change else next(iter(change))
    message = f"cannot be merged: .*{b}.* has {field}=.*, but .*{a}.* has {field}="
    with pytest.raises(kdfast.cache.CacheMismatchError, match=message):
        merge([a, b], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    with pytest.raises(kdfast.cache.CacheMismatchError, match="cannot be merged"):
        merge([b], a)
    assert len(kdfast.cache.open(a)) == 1


def test_a_corrupt_shard_is_not_copied(tmp_path):
    a = fill(tmp_path / "a", ["x"])
    (shard,) = a.glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(kdfast.cache.CacheCorruptError, match=r"shard-0-00000.*block 0: CRC"):
        merge([a], tmp_path / "all")
    assert not list((tmp_path / "all").glob("shard-*"))


def test_a_source_that_is_not_finished_is_mentioned(tmp_path):
    a = fill(tmp_path / "a", ["x"])

    def killed():
        with kdfast.cache.Writer(a, vocab_size=VOCAB, codec="topk", k=4, teacher="t", block_rows=1) as writer:
            writer.add("y", logits(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        killed()
    report = merge([a], tmp_path / "all")
    assert report.records == 1
    assert report.unfinished == sorted(map(str, [*a.glob("*.part"), *a.glob("*.journal")]))
    assert report.unfinished
    assert merge([fill(tmp_path / "b", ["x"])], tmp_path / "all").unfinished == []


def test_bad_sources_are_named(tmp_path):
    a = fill(tmp_path / "a", ["x"])
    with pytest.raises(kdfast.cache.CacheError, match="is both a source and the destination"):
        merge([a], tmp_path / "." / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(kdfast.cache.CacheError, match="empty: holds no shard"):
        merge([a, tmp_path / "empty"], tmp_path / "all")
    with pytest.raises(kdfast.cache.CacheError, match="at least one source"):
        merge([], tmp_path / "all")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        merge([tmp_path / "nowhere"], tmp_path / "all")


@kdfast.cache.codecs.register
class WithTable(kdfast.cache.codecs.TopK):
    """A codec that reads a file beside the shards."""

    name = "with_table"

    def __init__(self, vocab_size, temperatures, *, table="table-1.bin", content=None, **options):
        super().__init__(vocab_size, temperatures, **options)
        self.table, self.content = table, content

    def config(self):
        return {**super().config(), "table": self.table}

    @classmethod
    def options(cls, config, read_asset):
        return {**config, "content": read_asset(config["table"])}


@pytest.mark.parametrize("config", ['{"k":null,"value_dtype":"float16"}', '{"k":2,"value_dtype":"float16","x":1}'])
def test_a_source_of_options_that_no_writer_has_is_named(tmp_path, config):
    a = fill(tmp_path / "a", ["x"])
    (path,) = Path(a).glob("shard-*")
    repack(path, {"codec_config": config})
    with pytest.raises(kdfast.cache.CacheError, match="its labels cannot be decoded"):
        merge([a], tmp_path / "all")


@pytest.mark.parametrize("act", [kdfast.cache.open, lambda path: merge([path], f"{path}-all")])
def test_an_asset_elsewhere_is_not_read(tmp_path, act):
    a = fill(tmp_path / "a", ["x"], codec="with_table")
    (path,) = Path(a).glob("shard-*")
    repack(path, {"codec_config": '{"k":2,"table":"../secret","value_dtype":"float16"}'})
    (tmp_path / "secret").write_bytes(b"content")
    with pytest.raises(kdfast.cache.CacheCorruptError, match=r"asset '\.\./secret' is no file of the cache's own"):
        act(a)


def test_assets_come_along(tmp_path):
    a = tmp_path / "a"
    fill(a, ["x"], codec="with_table")
    (a / "table-1.bin").write_bytes(b"content")
    (a / "notes.txt").write_text("not of the cache")
    report = merge([a], tmp_path / "all")
    assert report.assets == 1
    assert (tmp_path / "all" / "table-1.bin").read_bytes() == b"content"
    assert not (tmp_path / "all" / "notes.txt").exists()
    assert merge([a], tmp_path / "all").assets == 0


# ---- places -----------------------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    yield "memory://kdfast-merge"
    fsspec.filesystem("memory").rm("/kdfast-merge", recursive=True)


@pytest.mark.parametrize("keys_", ["hash", "range"])
def test_urls_are_sources_and_destinations(tmp_path, memory, monkeypatch, keys_):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "downloads"))
    monkeypatch.chdir(tmp_path)
    options = {"keys_": keys_, "shard_bytes": 200, "block_rows": 2}
    a = fill(tmp_path / "a", range(8), **options)
    b = fill(f"{memory}/b", range(6, 12), seed=50, writer="rank1", staging=tmp_path / "staging", **options)
    reports = [merge([a, b], f"{memory}/all") for _ in range(2)]
    assert [(report.records, report.duplicates) for report in reports] == [(12, 2)] * 2
    assert (reports[1].copied, reports[1].present) == (0, reports[0].copied)
    cache = kdfast.cache.open(f"{memory}/all")
    cache.verify()
    for i in range(12):
        assert torch.equal(cache[i].values, values(a if i < 8 else b, i))
    back = merge([f"{memory}/all"], tmp_path / "back")
    assert (back.records, back.duplicates) == (12, 2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("memory")]
    with pytest.raises(kdfast.cache.CacheError, match="is both a source and the destination"):
        merge([f"{memory}/all/"], f"{memory}/all")
    with pytest.raises(kdfast.cache.CacheError, match="not to a URL"):
        merge([a], f"{memory}/linked", link=True)
    other = fill(tmp_path / "other", range(3), keys_=keys_, teacher="u")
    with pytest.raises(kdfast.cache.CacheMismatchError, match="cannot be merged"):
        merge([other], f"{memory}/all")


def test_the_command_line_takes_urls(tmp_path, memory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "downloads"))
    monkeypatch.chdir(tmp_path)
    a = fill(tmp_path / "a", range(3))
    done = CliRunner().invoke(app, ["cache", "merge", str(a), f"{memory}/all"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["cache", "info", f"{memory}/all"])
    assert done.exit_code == 0, done.output
    assert len(kdfast.cache.open(f"{memory}/all")) == 3
    assert names(tmp_path) == ["a", "downloads"]


def test_a_url_that_was_a_path_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = fill(tmp_path / "a", range(3))
    for act in (lambda path: merge([a], path), lambda path: fill(path, range(3)), kdfast.cache.open):
        with pytest.raises(ValueError, match=r"memory:/somewhere seems to be a URL .* pass 'memory://somewhere'"):
            act(Path("memory://somewhere"))
    assert names(tmp_path) == ["a"]


def test_one_source_is_no_list(tmp_path):
    a = fill(tmp_path / "a", range(3))
    for source in (a, str(a)):
        with pytest.raises(TypeError, match="sources must be a list of caches, got one"):
            merge(source, tmp_path / "b")
    assert names(tmp_path) == ["a"]


def test_a_source_that_is_not_begun_says_how_to_go_on(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "shard-0.journal").write_bytes(b"")
    for act in (lambda: merge([tmp_path / "a"], tmp_path / "b"), lambda: kdfast.cache.open(tmp_path / "a")):
        with pytest.raises(
            kdfast.cache.CacheError, match=r"holds no shard .* \(shard-0.journal\).*resumes.*kdfast.cache.salvage"
        ):
            act()


def test_what_was_declared_comes_along(tmp_path):
    a = fill(tmp_path / "a", range(3))
    merge([a], tmp_path / "all")
    assert (tmp_path / "all" / "cache.json").read_bytes() == (a / "cache.json").read_bytes()
