"""Statistics and export: counted by hand, and read back."""

import json

import numpy as np
import pytest
import torch

import kdfast
import kdfast.cache
from kdfast.cache.tools.export import export
from kdfast.cache.tools.plot import plot_stats
from kdfast.cache.tools.stats import MASS_BINS, cache_stats

pq = pytest.importorskip("pyarrow.parquet")

VOCAB = 40


def logits(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def fill(path, codec="topk", keys=range(5), keys_="hash", **options):
    """Records of 1, 2, 3, ... rows."""
    options["keys"] = keys_
    with kdfast.cache.Writer(path, vocab_size=VOCAB, codec=codec, teacher="t", **options) as writer:
        for i, key in enumerate(keys):
            writer.add(key, logits(i + 1, seed=i))
    return path


def test_bytes_add_up_to_the_files(tmp_path):
    path = fill(tmp_path, k=4, block_rows=4, shard_bytes=100)
    stats = cache_stats(path)
    assert stats.info.shards > 1
    assert stats.rows == stats.info.rows == 15
    assert stats.bytes.payload == 15 * (4 * 2 + 4 * 2 + 4)
    indices = [path / "cache.json", path / "manifest.json", path / "index.safetensors"]
    assert stats.bytes.indices == sum(p.stat().st_size for p in indices)
    assert (stats.bytes.assets, stats.bytes.model) == (0, 0)
    assert stats.bytes.files == sum(p.stat().st_size for p in path.iterdir())
    assert stats.block_bytes.tolist() == [20.0] * len(stats.block_bytes)
    (path / "table-1.bin").write_bytes(b"123")
    (path / "shard-0-00009.safetensors.1-ab.part").write_bytes(b"123")
    assert cache_stats(path).bytes.assets == 3


def test_entries_and_tails_are_counted_by_row(tmp_path):
    masked = logits(4)
    masked[0, 3:] = -torch.inf  # 3 entries, no tail
    masked[1] = 0.0  # 4 of 40 alike: a tail of 0.9
    masked[2] = torch.tensor([20.0, *[0.0] * (VOCAB - 1)])
    masked[3] = torch.tensor([1.0, *[-torch.inf] * (VOCAB - 1)])
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="topk", k=4, temperatures=(1.0, 2.0)) as writer:
        writer.add("a", masked)
        assert writer.duplicates == 0
    stats = cache_stats(tmp_path)
    assert stats.kind == "topk"
    assert stats.entries.tolist() == [0, 1, 0, 1, 2]
    assert stats.entries_per_row == pytest.approx((1 + 3 + 4 + 4) / 4)
    assert stats.tail_mass.sum(1).tolist() == [4, 4]
    assert stats.tail_mass[0, 0] == 3  # two rows without a tail and one of 36 exp(-20)
    assert stats.tail_mass[1, 0] == 2
    (bin_of_nine_tenths,) = stats.tail_mass[0, 1:].nonzero()[0] + 1
    assert MASS_BINS[bin_of_nine_tenths] <= 0.9 < MASS_BINS[bin_of_nine_tenths + 1]
    assert stats.mean_tail_mass[0] == pytest.approx(0.9 / 4, rel=1e-5)
    assert stats.tail_quantile(0.5) == pytest.approx(1e-6)
    assert stats.tail_quantile(1.0) == pytest.approx(1.0)


def test_duplicates_are_left_out_of_the_rows(tmp_path):
    fill(tmp_path, k=4, writer="a", keys=["x", "y"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kdfast.cache.Writer, "__contains__", lambda *args: False)
        other = tmp_path / "other"
        fill(other, k=4, writer="b", keys=["y", "z"])
    (shard,) = other.glob("shard-*")
    shard.rename(tmp_path / shard.name)
    stats = cache_stats(tmp_path)
    assert (stats.info.duplicates, stats.info.records, stats.rows, stats.info.rows) == (1, 3, 1 + 2 + 2, 6)


def test_dense_labels_have_neither_entries_nor_tails(tmp_path):
    stats = cache_stats(fill(tmp_path, codec="dense"))
    assert (stats.kind, stats.rows, len(stats.entries), stats.tail_mass) == ("dense", 15, 0, None)


def test_the_teachers_cross_entropy(tmp_path):
    rows = logits(3)
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="topk", k=4) as writer:
        writer.add("a", rows, targets=torch.tensor([1, 2, -100]))
    expected = torch.nn.functional.cross_entropy(rows, torch.tensor([1, 2, -100])).item()
    assert cache_stats(tmp_path).info.cross_entropy == pytest.approx(expected, rel=1e-6)
    assert cache_stats(fill(tmp_path / "without", k=4)).info.cross_entropy is None


@pytest.mark.parametrize("codec", ["topk", "dense"])
def test_the_plot_is_a_picture(tmp_path, codec):
    pytest.importorskip("matplotlib")
    path = fill(tmp_path / "cache", codec=codec)
    plot_stats(cache_stats(path), tmp_path / "plot.out")
    assert (tmp_path / "plot.out").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.out").stat().st_size > 10_000


def test_without_matplotlib_its_name_is_said(tmp_path, monkeypatch):
    stats = cache_stats(fill(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(kdfast.cache.CacheError, match="plotting needs the package matplotlib"):
        plot_stats(stats, tmp_path / "x.png")


# ---- export -------------------------------------------------------------------------------------------------------


def read(path):
    table = pq.read_table(path)
    return table, {row["key"]: row for row in table.to_pylist()}


def test_exported_topk_labels_are_those_of_the_cache(tmp_path):
    path = fill(tmp_path / "cache", k=4, temperatures=(1.0, 2.0), shard_bytes=100, block_rows=2)
    assert export(path, tmp_path / "out.parquet") == 5
    table, rows = read(tmp_path / "out.parquet")
    cache = kdfast.cache.open(path)
    assert [row["key"] for row in table.select(["key"]).to_pylist()] == [key.hex() for key in cache]
    for i in range(5):
        row, labels = rows[kdfast.cache.format.keys.make_key(i).hex()], cache[i]
        assert row["rows"] == len(labels) == i + 1
        back = kdfast.SoftLabels.topk(
            torch.tensor(row["ids"]),
            torch.tensor(row["log_probs"]),
            torch.tensor(row["tails"]).view(-1, 2).T,
            vocab_size=VOCAB,
            temperatures=(1.0, 2.0),
            offsets=torch.tensor([0, *row["counts"]]).cumsum(0),
        )
        for field in ("ids", "values", "offsets", "tails"):
            assert torch.equal(getattr(back, field), getattr(labels, field)), field
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 2
    lists = [str(table.schema.field(name).type) for name in ("counts", "ids", "log_probs", "tails")]
    assert all(kind.startswith("large_list<") for kind in lists)
    about = json.loads(table.schema.metadata[b"kdfast"])
    assert (about["kind"], about["teacher"], about["temperatures"]) == ("topk", "t", [1.0, 2.0])


def test_exported_draws_keep_the_teachers_log_probabilities(tmp_path):
    path = fill(tmp_path / "cache", codec="scored", draws=9)
    export(path, tmp_path / "out.parquet")
    table, rows = read(tmp_path / "out.parquet")
    assert table.column_names == ["key", "rows", "counts", "ids", "weights", "log_probs"]
    row, labels = rows[kdfast.cache.format.keys.make_key(3).hex()], kdfast.cache.open(path)[3]
    assert (row["ids"], row["weights"]) == (labels.ids.tolist(), labels.values.tolist())
    assert row["log_probs"] == labels.log_probs.tolist()


def test_integer_keys_are_exported_in_decimal(tmp_path):
    path = fill(tmp_path / "cache", k=4, keys_="range")
    export(path, tmp_path / "out.parquet")
    assert [row["key"] for row in read(tmp_path / "out.parquet")[0].to_pylist()] == ["0", "1", "2", "3", "4"]
    assert cache_stats(path).rows == 15


def test_exported_dense_labels(tmp_path):
    path = fill(tmp_path / "cache", codec="dense")
    export(path, tmp_path / "out.parquet")
    table, rows = read(tmp_path / "out.parquet")
    assert table.column_names == ["key", "rows", "log_probs"]
    row = rows[kdfast.cache.format.keys.make_key(3).hex()]
    want = kdfast.cache.open(path)[3].values.numpy()
    np.testing.assert_array_equal(np.array(row["log_probs"], np.float32).reshape(4, VOCAB), want)


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = fill(tmp_path / "cache", k=4)
    out = tmp_path / "out.parquet"
    out.write_text("old")
    (shard,) = path.glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(kdfast.cache.CacheCorruptError, match="block 0"):
        export(path, out)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out.parquet"]
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(kdfast.cache.CacheError, match="writing Parquet needs the package pyarrow: pip install pyarrow"):
        export(path, out)
