"""What every row op's launch decides: its tile, its grid, and how a divergence reaches the kernel."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import kdfast._C as _C
from kdfast._calls import DenseCall, SparseCall

__all__ = [
    "HAS_CLUSTERS",
    "KINDS",
    "Shape",
    "check_rows",
    "constants_of",
    "has_clusters",
    "holds_rows",
    "launch",
    "load_of",
    "programs_for",
    "row_arguments",
    "strides",
    "tile_for",
]

KINDS: tuple[str, ...] = _C.divergences()
_FAMILIES = {
    "forward_kl": "forward",
    "soft_ce": "forward",
    "dkd": "forward",
    "reverse_kl": "reverse",
    "symmetric_kl": "reverse",
    "logit_mse": "mse",
}


class Shape(NamedTuple):
    """Columns of a tile, its warps, programs per multiprocessor, thread blocks of each, and tiles that it holds."""

    block: int
    warps: int
    programs: int
    ctas: int = 1
    tiles: int = 0

    def options(self) -> dict[str, int]:
        """As Triton takes them: without the bound, ptxas spills some registers for more programs than there are."""
        most = 65536 // (32 * self.warps * self.programs)
        return {"num_warps": self.warps, "num_ctas": self.ctas, "maxnreg": min(most, 255)}


# By the most columns that it is for. Two rows' tiles of 16 columns a thread fit the registers where a column is two
# exponentials and their product ("light"), 8 where it is more ("heavy"), 4 where each has an address ("odd"). Few
# programs leave few rows in flight, whose second reads the second-level cache still holds. A cluster of programs may
# hold the whole row ("held"), 8 columns of each of its tiles a thread.
SHAPES = {
    "light": ((1024, Shape(1024, 4, 4)), (2048, Shape(2048, 4, 4)), (1 << 31, Shape(4096, 8, 2))),
    "heavy": ((1024, Shape(1024, 4, 4)), (1 << 31, Shape(2048, 8, 2))),
    "odd": ((512, Shape(512, 4, 4)), (1 << 31, Shape(1024, 8, 2))),
    "held": (
        *((8192 * n, Shape(4096 * n, 16, 1, n, 2)) for n in (1, 2, 4, 8, 16)),
        (196608, Shape(65536, 16, 1, 16, 3)),
    ),
}
# Before, a reduction over several thread blocks does not compile.
HAS_CLUSTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
# The interpreter's: enough for programs to have several rows.
INTERPRETED_PROGRAMS = 3


def load_of(constants: dict[str, Any], columns: int, labelled: bool, *rows: Tensor | None) -> str:
    """What a column weighs: the key of its shapes. Loads of unaligned rows need an address per column.

    Class probabilities as labels are one more row to hold.
    """
    strided = [x for x in rows if x is not None]
    aligned = columns % 8 == 0 and all(stride % 8 == 0 for x in strided for stride in x.stride()[:2])
    narrow = all(x.element_size() == 2 for x in strided)
    plain = constants["FAMILY"] == "forward" and not (constants["STANDARDIZE"] or constants["SMOOTH"] or labelled)
    return "odd" if not aligned else "light" if plain and narrow else "heavy"


def holds_rows(student: Tensor, call: DenseCall, constants: dict[str, Any], load: str) -> bool:
    """Whether clusters of thread blocks can hold the rows in their registers and read them once.

    Other divergences would spill.
    """
    if load == "odd" or not has_clusters(student.device):
        return False
    columns, widest = student.shape[2], SHAPES["held"][-1][0]
    plain = not (call.standardize or call.want_parts or constants["SMOOTH"]) and call.label_probs is None
    forward = constants["KIND"] in ("forward_kl", "soft_ce")
    return forward and plain and columns == call.teacher.shape[2] <= widest


@cache
def has_clusters(device: torch.device) -> bool:
    """The interpreter needs none."""
    return device.type != "cuda" or (HAS_CLUSTERS and torch.cuda.get_device_capability(device) >= (9, 0))


def tile_for(load: str, columns: int, *rows: Tensor) -> tuple[Shape, int]:
    """(Shape, columns that a thread loads at once): 16 bytes of the widest dtype."""
    shape = next(shape for most, shape in SHAPES[load] if columns <= most)
    return shape, 16 // max(x.element_size() for x in rows)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs_for(rows: int, device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a launch: each takes every n-th row."""
    if device.type != "cuda":
        return min(rows, INTERPRETED_PROGRAMS)
    index = torch.cuda.current_device() if device.index is None else device.index
    return min(rows, _multiprocessors(index) * per_multiprocessor)


def row_arguments(student: Tensor, grad: Tensor | None, call: DenseCall | SparseCall) -> dict[str, Any]:
    """What both row ops' kernels take."""
    outer, inner, columns = student.shape
    rows = outer * inner
    return {
        "student": student,
        "grad": grad,
        "label": call.label,
        "probs": call.label_probs,
        "coef": call.coef.contiguous(),
        "loss": call.coef.new_empty(rows),
        "parts": call.coef.new_empty(4, rows) if call.want_parts else None,
        "rows": rows,
        "inner": inner,
        **strides("s", student),
        **strides("g", grad),
        **strides("p", call.label_probs),
        "columns": columns,
        "smoothing": call.smoothing,
        **numbers_of(call.kind, call.a, call.b, call.scale),
    }


def launch(kernel: Any, arguments: dict[str, Any], programs: int) -> tuple[Tensor, Tensor]:
    """Runs a row kernel by keyword. (rows,) losses and (4, rows) parts, or (4, 0) where nobody wants them."""
    if programs:
        with torch.cuda.device_of(arguments["student"]):
            kernel[(programs,)](**arguments)
    parts = arguments["parts"]
    return arguments["loss"], arguments["coef"].new_empty(4, 0) if parts is None else parts


def check_rows(**tensors: Tensor | None) -> None:
    """What a kernel cannot check: rows that it reads lie along the vocabulary."""
    for name, x in tensors.items():
        if x is not None and (x.dim() != 3 or (x.shape[2] > 1 and x.stride(2) != 1)):
            raise ValueError(
                f"{name} must be (outer, inner, vocabulary) of unit stride along the last, "
                f"got {tuple(x.shape)} with strides {x.stride()}"
            )


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """The two strides before the vocabulary, as the kernels name them."""
    outer, inner = (0, 0) if x is None else x.stride()[:2]
    return {f"outer_{name}": outer, f"inner_{name}": inner}


def constants_of(kind: int, a: float, b: float) -> dict[str, Any]:
    """What of a divergence a kernel is compiled for."""
    name = KINDS[kind]
    case = ""
    if name == "alpha_beta":
        zeros = {"a=b=0": a == b == 0.0, "b=0": b == 0.0, "a=0": a == 0.0, "a+b=0": a + b == 0.0}
        case = next((case for case, holds in zeros.items() if holds), "")
    elif name in ("jsd", "skew_forward_kl", "skew_reverse_kl"):
        beta = 1.0 - a if name == "skew_reverse_kl" else a
        case = "near_q" if beta <= 0.5 else ""
    return {"KIND": name, "FAMILY": _FAMILIES.get(name, "element"), "CASE": case}


def numbers_of(kind: int, a: float, b: float, scale: float) -> dict[str, float]:
    """Its parameters; logarithms that only mixtures have, and only they are in range of."""
    mixes = KINDS[kind] in ("jsd", "skew_forward_kl", "skew_reverse_kl")
    return {
        "a": a,
        "b": b,
        "rest": 1.0 - a,
        "minus_log_a": -math.log(a) if mixes else 0.0,
        "minus_log_rest": -math.log1p(-a) if mixes else 0.0,
        "factor": scale,
    }
