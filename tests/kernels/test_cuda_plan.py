"""How many thread blocks share a row: no GPU is asked."""

import pytest

from kdfast.kernels.cluster import fullest


@pytest.mark.parametrize(
    ("smallest", "resident", "expected"),
    [
        (4, {4: 264, 8: 264, 16: 264}, 4),  # the smallest of which there are enough
        (8, {8: 120, 16: 240}, 16),  # clusters of 8 that leave multiprocessors empty
        (8, {8: 120, 16: 112}, 8),  # none is enough
        (16, {16: 0}, 0),  # a part of a GPU
        (0, {}, 0),  # rows that are for other kernels
    ],
)
def test_the_smallest_cluster_that_fills_the_device(smallest, resident, expected):
    assert fullest(smallest, 264, resident.__getitem__) == expected
