"""Checks of arguments that several rooms share: of numbers, and whether the values inside a tensor may be looked at."""

from __future__ import annotations

import os
import sys
from numbers import Integral, Rational, Real

import torch
from torch import Tensor, nn

__all__ = ["LARGEST", "can_look", "check_flags", "check_integer", "check_number", "values_are_checked"]

LARGEST = sys.float_info.max  # an int above it is no float


def check_number(name: str, value: object, *, least: float = -LARGEST, most: float = LARGEST) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is no real number.
        ValueError: it is not finite, or not in [least, most].
    """
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # NumPy's narrow numbers overflow where they are compared with a float; Python's long ones where they become one.
    number = value if type(value) is float or isinstance(value, Rational) else float(value)
    if not least <= number <= most:  # type: ignore[operator]
        finite = "finite" if most == LARGEST else f"in [{least:g}, {most:g}]"
        sign = " and not negative" if least == 0.0 and most == LARGEST else ""
        raise ValueError(f"{name} must be {finite}{sign}, got {repr(value)[:40]}")
    return float(value)


def check_integer(name: str, value: object, *, least: int = -(2**63), hint: str = "") -> int:
    """``value`` as an int.

    Raises:
        TypeError: it is no integer; ``hint`` ends the message.
        ValueError: it is below ``least``, or has more than 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}{hint}")
    if not least <= int(value) < 2**63:
        wanted = f"at least {least}" if int(value) < least else "an integer of 64 bits"
        raise ValueError(f"{name} must be {wanted}, got {repr(value)[:40]}")
    return int(value)


def check_flags(**flags: object) -> None:
    """Raise ``TypeError`` unless all are bools, or 0 or 1."""
    for name, value in flags.items():
        if type(value) is not bool and not isinstance(value, int) and type(value).__name__ not in ("bool", "bool_"):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


_PLAIN = (Tensor, nn.Parameter)  # no FakeTensor, no DTensor


def values_are_checked() -> bool:
    """Whether KDFAST_CHECK=1 asks for checks of the values inside tensors, which wait for the device."""
    return os.environ.get("KDFAST_CHECK", "") == "1"


def can_look(x: Tensor) -> bool:
    """Whether the values of ``x`` may be looked at, which waits for no device and breaks no trace.

    It is an ordinary CPU tensor then, and nothing traces or transforms calls.
    """
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and type(x) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._is_tracing()
    )
