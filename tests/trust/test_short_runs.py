"""A few steps of each fuzzer that needs no compiler, so that they keep working; the long runs are theirs."""

from collections import Counter

import pytest

import bits
import reader_fuzz


@pytest.mark.parametrize("kind", reader_fuzz.CASES)
def test_changed_caches_are_refused_or_right(tmp_path, kind):
    left, counts = tmp_path / "left", Counter()
    reader_fuzz.leave(left)
    for seed in range(8):
        reader_fuzz.one(seed, kind, tmp_path, left, counts)
    assert counts["failures"] == 0
    assert sum(counts.values()) == 8


def test_flipped_bits_are_detected(tmp_path):
    for path, want in bits.files(["topk"]):
        for other in path.parent.iterdir():
            (tmp_path / other.name).write_bytes(other.read_bytes())
        for change in (0, 70, 8 * path.stat().st_size - 1, -1, -path.stat().st_size):
            assert bits.try_one(tmp_path, path, want, change).startswith("detected")
