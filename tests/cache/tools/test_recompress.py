"""One kdfast cache from another: what the target declares is all that is lost, and nothing is made up."""

import pytest
import torch

import kdfast
import kdfast.cache
from kdfast.cache.convert import recompress


def teacher(rows, seed, vocab=50):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 3).log_softmax(1)


def fill(path, codec="topk", temperatures=(1.0, 2.0), rows=3, **options):
    with kdfast.cache.Writer(
        path, vocab_size=50, codec=codec, temperatures=temperatures, teacher="t", **options
    ) as writer:
        for i in range(4):
            writer.add(i, teacher(rows, i))
    return path


def test_fewer_entries_are_as_if_captured_so(tmp_path):
    fill(tmp_path / "a", k=8, value_dtype="float32")
    fill(tmp_path / "b", k=3, value_dtype="float32")
    report = recompress(tmp_path / "a", tmp_path / "c", codec="topk", k=3)
    want, got = kdfast.cache.open(tmp_path / "b"), kdfast.cache.open(tmp_path / "c")
    # How far the teacher's rows are is known where these are at hand.
    unlike = {"file_bytes": 0, "floor": None}
    assert vars(got.info) | unlike == vars(want.info) | unlike
    for i in range(4):
        assert torch.equal(got[i].ids, want[i].ids)
        assert torch.equal(got[i].values, want[i].values)
        torch.testing.assert_close(got[i].tails, want[i].tails, rtol=1e-5, atol=1e-6)
    assert report.mean_mass == pytest.approx(float(-torch.expm1(want.gather(range(4)).tails[0]).mean()), rel=1e-5)


def test_narrower_values_and_fewer_temperatures(tmp_path):
    fill(tmp_path / "a", k=8, value_dtype="float32")
    recompress(tmp_path / "a", tmp_path / "b", codec="topk", temperatures=[2.0], value_dtype="float16")
    a, b = (kdfast.cache.open(tmp_path / name) for name in "ab")
    assert (b.info.temperatures, b.info.config) == ((2.0,), {"k": 8, "value_dtype": "float16"})
    torch.testing.assert_close(b[0].tails[0], a[0].tails[1], rtol=1e-6, atol=0)
    assert torch.equal(b[0].values, a[0].values.half().float())


def test_dense_labels_become_topk(tmp_path):
    fill(tmp_path / "a", codec="dense")
    report = recompress(tmp_path / "a", tmp_path / "b", codec="topk", k=5, value_dtype="float32")
    a, b = (kdfast.cache.open(tmp_path / name) for name in "ab")
    top = a[2].values.topk(5, 1)
    assert torch.equal(b[2].ids.view(3, 5).long(), top.indices)
    torch.testing.assert_close(b[2].values.view(3, 5), top.values)
    assert b.info.temperatures == (1.0, 2.0)
    mass = a.gather(range(4)).values.exp().topk(5, 1).values.sum(1).mean().item()
    assert report.mean_mass == pytest.approx(mass, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "dense"}, r"holds topk labels \(topk\), which a dense cache cannot be made from"),
        ({"codec": "topk", "k": 9}, "holds at most 8 entries per row, k=9 are wanted"),
        ({"codec": "topk", "temperatures": [3.0]}, r"tails for temperatures \(1.0, 2.0\), not for \[3.0\]"),
    ],
)
def test_what_a_cache_does_not_say_is_refused(tmp_path, options, message):
    fill(tmp_path / "a", k=8)
    with pytest.raises(kdfast.cache.CacheError, match=message):
        recompress(tmp_path / "a", tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


@kdfast.cache.codecs.register
class Weights(kdfast.cache.codecs.TopK):
    """A codec of weights, laid out as top-k."""

    name = "weights_of_a_test"
    kind = "weights"

    def unpack(self, packed):
        labels = super().unpack(packed)
        return kdfast.SoftLabels.weights(
            labels.ids, labels.values.exp(), vocab_size=self.vocab_size, offsets=labels.offsets
        )


def test_weights_do_not_become_topk(tmp_path):
    fill(tmp_path / "a", codec=Weights.name, temperatures=(1.0,), k=4)
    with pytest.raises(kdfast.cache.CacheError, match=r"holds weights labels .* a topk cache cannot be made from"):
        recompress(tmp_path / "a", tmp_path / "b", codec="topk", k=4)


def test_integer_keys_stay_integers(tmp_path):
    for name, first in [("late", 3), ("early", 0)]:  # sealed out of order
        with kdfast.cache.Writer(tmp_path / "a", vocab_size=50, codec="topk", k=4, keys="range", writer=name) as writer:
            for i in range(first, first + 3):
                writer.add(i, teacher(i + 1, i))
    assert recompress(tmp_path / "a", tmp_path / "b", codec="topk", k=2).records == 6
    a, b = (kdfast.cache.open(tmp_path / name) for name in "ab")
    assert (list(b), b.info.keys) == (list(range(6)), "range")
    for i in range(6):
        assert torch.equal(b[i].ids.view(-1, 2), a[i].ids.view(-1, 4)[:, :2])


def test_several_shards(tmp_path):
    fill(tmp_path / "a", k=8, block_rows=2, shard_bytes=300)
    assert kdfast.cache.open(tmp_path / "a").info.shards > 1
    recompress(tmp_path / "a", tmp_path / "b", codec="topk")
    a, b = (kdfast.cache.open(tmp_path / name) for name in "ab")
    assert list(a) == list(b)
    for i in range(4):
        assert torch.equal(a[i].values, b[i].values)
        torch.testing.assert_close(a[i].tails, b[i].tails)
