"""One compiled form of a Triton kernel, so that every form that a launch may ask for can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Variant"]


@dataclass(frozen=True)
class Variant:
    """What a launch specialises a kernel on: one call of it, whose tensors may lie on the ``meta`` device.

    Args:
        name: tells it from the kernel's other variants.
        kernel: the ``@triton.jit`` function.
        call: what a launch passes by keyword: the arguments, and Triton's options.
        everyday: compiled by every run of the tests; the others by ``make full``.
        gathers: each lane reads what is at its own place, so that no load is wide.
    """

    name: str
    kernel: Any
    call: Mapping[str, Any]
    everyday: bool = True
    gathers: bool = False

    @property
    def ctas(self) -> int:
        """Thread blocks that are one program, as a cluster."""
        return int(self.call.get("num_ctas", 1))

    def compile(self, capability: int) -> Any:
        """Triton's compiled kernel for ``sm_<capability>``: its ``asm`` holds the PTX and the cubin.

        Triton specialises the call as a launch does, but for a device that is not there. From then on the process can
        launch no kernel.
        """
        from triton.runtime.driver import driver

        driver.set_active(_AbsentGpu(capability))
        return self.kernel.run(grid=(1,), warmup=True, **self.call)


class _AbsentGpu:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """A device of its own for each target: Triton keeps what it has compiled by device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0
