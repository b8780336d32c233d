"""Record keys: stable, and never equal across types."""

import numpy as np
import pytest
import torch

from kdfast.cache.format.keys import Key, describe, make_key


def test_keys_of_different_types_do_not_collide():
    keys = [5, "5", b"5", torch.tensor([5]), [5].__repr__(), "", b"", torch.tensor([], dtype=torch.int64), 0, -5]
    assert len({make_key(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_hash_the_same_in_every_width(dtype):
    assert make_key(torch.tensor([1, 2, 100], dtype=dtype)) == make_key(np.array([1, 2, 100]))


def test_ids_are_hashed_as_little_endian_u32():
    # BLAKE2b-128, person "kdfast:ids", of 01000000 00000100: a stored cache depends on it.
    assert make_key(torch.tensor([1, 65536])).hex() == "cd68f7e63870768093f9508fed967e2e"
    assert make_key("name").hex() == "eb2b81cbdf7b65073172cde1ce34ef81"


def test_ids_are_not_joined_ambiguously():
    assert make_key(torch.tensor([1, 2])) != make_key(torch.tensor([2, 1])) != make_key(torch.tensor([1, 2, 0]))


def test_strided_ids_and_numpy_integers():
    ids = torch.arange(10)
    assert make_key(ids[::2]) == make_key(ids[::2].clone())
    assert make_key(np.int64(7)) == make_key(7)


def test_a_stored_key_stands_for_itself():
    key = make_key("sample")
    assert make_key(key) is key
    assert make_key(bytes(key)) != key
    with pytest.raises(ValueError, match="16 bytes, got 3"):
        Key(b"abc")


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (1.5, TypeError, "a key is .* got float"),
        (True, TypeError, "got bool"),
        (None, TypeError, "got NoneType"),
        ([1, 2], TypeError, "got list"),
        (torch.tensor([1.0]), TypeError, "1-D integers, got float32"),
        (torch.tensor([[1]]), TypeError, r"1-D integers, got int64 of shape \(1, 1\)"),
        (torch.tensor([True]), TypeError, "1-D integers, got bool"),
        (torch.tensor([3, -1]), ValueError, r"lie in \[0, 2\*\*32\), got -1 to 3"),
        (torch.tensor([2**32]), ValueError, "got 4294967296 to 4294967296"),
    ],
)
def test_bad_keys_are_named(key, error, message):
    with pytest.raises(error, match=message):
        make_key(key)


def test_descriptions_are_short():
    assert describe(torch.arange(1000)) == "ids [0, 1, 2, 3, ...] of shape (1000,)"
    assert describe(torch.arange(2)) == "ids [0, 1] of shape (2,)"
    assert len(describe("x" * 1000)) == 80
