"""What the launch of a row op decides: its tile, how many programs run, and what its kernel is compiled for."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast._calls import KINDS, DenseCall, SparseCall
from kdfast.kernels.rowmath import ONE_READ, case_of, family_of, parameters_of
from kdfast.kernels.rows import Results, Spec, strided
from kdfast.kernels.targets import Targets

__all__ = [
    "HAS_CLUSTERS",
    "TILE_CONFIGS",
    "TileConfig",
    "check_rows",
    "check_vectors",
    "cost_of_column",
    "has_clusters",
    "launch",
    "programs_for",
    "row_arguments",
    "spec_of",
    "supports_one_read",
    "tile_for",
]


class TileConfig(NamedTuple):
    """How a kernel takes a row apart."""

    block: int  # columns of a tile
    warps: int  # of a thread block
    programs: int  # per multiprocessor
    ctas: int = 1  # thread blocks of a program
    tiles: int = 0  # that hold a whole row on the chip; 0: rows are swept

    def options(self) -> dict[str, int]:
        """Triton's options. Without the bound of registers, ptxas spills to make room for more programs than run."""
        most = 65536 // (32 * self.warps * self.programs)
        return {"num_warps": self.warps, "num_ctas": self.ctas, "maxnreg": min(most, 255)}


# For each cost of a column, the tile for rows of at most so many columns. Registers set its size: two rows' tiles of 16
# columns a thread fit where a column is two exponentials and their product ("light"), 8 where it is more ("heavy"), 4
# where each column has an address of its own ("odd"). With few programs few rows are in flight, so that a row's second
# read still hits the second-level cache. "on_chip": a cluster of thread blocks holds the whole row, 8 columns of each
# of its tiles a thread.
TILE_CONFIGS = {
    "light": ((1024, TileConfig(1024, 4, 4)), (2048, TileConfig(2048, 4, 4)), (1 << 31, TileConfig(4096, 8, 2))),
    "heavy": ((1024, TileConfig(1024, 4, 4)), (1 << 31, TileConfig(2048, 8, 2))),
    "odd": ((512, TileConfig(512, 4, 4)), (1 << 31, TileConfig(1024, 8, 2))),
    "on_chip": (
        *((8192 * n, TileConfig(4096 * n, 16, 1, n, 2)) for n in (1, 2, 4, 8, 16)),
        (196608, TileConfig(65536, 16, 1, 16, 3)),
    ),
}
# Before Triton 3.9 a reduction over several thread blocks does not compile.
HAS_CLUSTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
# Programs in the interpreter: few, so that each has several rows.
INTERPRETED_PROGRAMS = 3


# ---- tiles and programs ----------------------------------------------------------------------------------------------


def cost_of_column(call: DenseCall | SparseCall, standardize: bool, *rows: Tensor | None) -> str:
    """What a column costs a thread, as a key of TILE_CONFIGS; ``rows`` are what the kernel reads and writes.

    Loads of unaligned rows need an address per column. Class probabilities as targets are one more row to hold.
    """
    present = [x for x in rows if x is not None]
    strides = [stride for x in present for stride in x.stride()[:2]]
    aligned = all(x % 8 == 0 for x in (*strides, present[0].shape[2]))
    narrow = all(x.element_size() == 2 for x in present)
    forward = family_of(KINDS[call.kind]) == "forward"
    plain = forward and not (standardize or call.smoothing != 0.0 or call.label_probs is not None)
    return "odd" if not aligned else "light" if plain and narrow else "heavy"


def supports_one_read(student: Tensor, call: DenseCall, cost: str) -> bool:
    """Whether clusters of thread blocks can hold the rows of a call in their registers and read them once."""
    if cost == "odd" or not has_clusters(student.device):
        return False
    columns, widest = student.shape[2], TILE_CONFIGS["on_chip"][-1][0]
    plain = not (call.standardize or call.want_parts or call.smoothing != 0.0) and call.label_probs is None
    return KINDS[call.kind] in ONE_READ and plain and columns == call.teacher.shape[2] <= widest


@cache
def has_clusters(device: torch.device) -> bool:
    """Whether a program may be a cluster of thread blocks; the interpreter needs none."""
    return device.type != "cuda" or (HAS_CLUSTERS and torch.cuda.get_device_capability(device) >= (9, 0))


def tile_for(cost: str, columns: int, *rows: Tensor) -> tuple[TileConfig, int]:
    """(TileConfig, columns that a thread loads at once): 16 bytes of the widest dtype."""
    tile = next(tile for most, tile in TILE_CONFIGS[cost] if columns <= most)
    return tile, 16 // max(x.element_size() for x in rows)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs_for(rows: int, device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a launch: each takes every n-th row."""
    if device.type != "cuda":
        return min(rows, INTERPRETED_PROGRAMS)
    index = torch.cuda.current_device() if device.index is None else device.index
    return min(rows, _multiprocessors(index) * per_multiprocessor)


# ---- arguments -------------------------------------------------------------------------------------------------------


def check_rows(**tensors: Tensor | None) -> None:
    """What a kernel cannot check: rows that it reads lie along the vocabulary, and there are as many of each.

    Raises:
        ValueError: they do not, or there are not.
    """
    rows = None
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dim() != 3 or (x.shape[2] > 1 and x.stride(2) != 1):
            raise ValueError(
                f"{name} must be (outer, inner, vocabulary) of unit stride along the last, "
                f"got {tuple(x.shape)} with strides {x.stride()}"
            )
        rows = x.shape[0] * x.shape[1] if rows is None else rows
        if x.shape[0] * x.shape[1] != rows:
            raise ValueError(f"{name} must have {rows} rows, got {tuple(x.shape)}")


def check_vectors(**tensors: tuple[Tensor | None, torch.dtype, int]) -> None:
    """What a kernel cannot check: vectors that it indexes are contiguous, of their dtype, and as long as it reads.

    Args:
        tensors: by name, each with its dtype and the number of its elements.

    Raises:
        ValueError: one is not.
    """
    for name, (x, dtype, count) in tensors.items():
        if x is not None and (x.numel() != count or x.dtype != dtype or not x.is_contiguous()):
            raise ValueError(
                f"{name} must be {count} contiguous {dtype}, got {x.dtype} {tuple(x.shape)} with strides {x.stride()}"
            )


def spec_of(
    call: DenseCall | SparseCall,
    tile: TileConfig,
    width: int,
    teacher: str,
    standardize: bool = False,
    entries: int = 0,
) -> Spec:
    """What the kernel of a call is compiled for."""
    name = KINDS[call.kind]
    divergence = name, family_of(name), case_of(name, call.a, call.b)
    targets = call.label is not None, call.label_probs is not None, call.smoothing != 0.0
    return _constants(*divergence, teacher, standardize, *targets, tile.block, width, tile.tiles, entries)


@cache
def _constants(*fields: str | bool | int) -> Spec:
    return Spec(*map(tl.constexpr, fields))


def row_arguments(student: Tensor, grad: Tensor | None, call: DenseCall | SparseCall) -> dict[str, Any]:
    """The arguments that the kernels of both row ops take."""
    rows, probs = student.shape[0] * student.shape[1], call.label_probs
    check_vectors(label=(call.label, torch.int64, rows))
    if call.coef.shape != (5, rows):
        raise ValueError(f"coef must be (5, {rows}), got {tuple(call.coef.shape)}")
    if probs is not None and probs.shape[2] != student.shape[2]:
        raise ValueError(f"label_probs must have {student.shape[2]} columns, got {tuple(probs.shape)}")
    return {
        "student": strided(student),
        "grad": strided(grad),
        "targets": Targets(call.label, strided(probs), call.smoothing),
        "coef": call.coef.contiguous(),
        "results": Results(call.coef.new_empty(rows), call.coef.new_empty(4, rows) if call.want_parts else None),
        "by": parameters_of(KINDS[call.kind], call.a, call.b, call.scale),
    }


def launch(kernel: Any, arguments: dict[str, Any], programs: int) -> tuple[Tensor, Tensor]:
    """Runs a row op's kernel. (rows,) losses and (4, rows) parts, or (4, 0) where nobody wants them."""
    results = arguments["results"]
    if programs:
        with torch.cuda.device_of(results.loss):
            kernel[(programs,)](**arguments)
    return results.loss, results.loss.new_empty(4, 0) if results.parts is None else results.parts
