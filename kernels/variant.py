"""One compiled form of a Triton kernel, so that every form that a launch may ask for can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Variant"]

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Variant:
    """What a launch specialises a kernel on.

    Args:
        name: tells it from the kernel's other variants.
        kernel: the ``@triton.jit`` function.
        types: its run-time arguments' types, as Triton spells them: ``"*bf16"``, ``"i32"``, ``"fp32"``, ...
        constants: its ``tl.constexpr`` arguments.
        aligned: which run-time arguments are divisible by 16. Without that of a row's stride, its loads are narrow.
        warps: of each program.
        ctas: thread blocks that are one program, as a cluster.
        registers: at most so many per thread.
        gathers: each lane reads what is at its own place, so that no load is wide.
        everyday: compiled by every run of the tests; the others by ``make full``.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    ctas: int = 1
    everyday: bool = True
    registers: int | None = None
    gathers: bool = False

    @classmethod
    def of_call(cls, name: str, kernel: Any, arguments: Mapping[str, Any], everyday: bool = True) -> Variant:
        """What Triton makes of a call by keyword: every tensor begins at a multiple of 16 bytes.

        ``tl.constexpr`` arguments are the ones in capitals.
        """
        types, constants, aligned = {}, {}, []
        for key, value in arguments.items():
            if key in ("num_warps", "num_ctas", "maxnreg"):
                continue
            if value is None or key.isupper() or (isinstance(value, int) and value == 1):
                constants[key] = value
            elif isinstance(value, Tensor):
                types[key] = "*" + _TYPES[value.dtype]
                aligned.append(key)
            else:
                types[key] = "fp32" if isinstance(value, float) else "i32" if value < 1 << 31 else "i64"
                if isinstance(value, int) and value % 16 == 0:
                    aligned.append(key)
        return cls(
            name,
            kernel,
            types,
            constants,
            tuple(aligned),
            arguments["num_warps"],
            arguments["num_ctas"],
            everyday,
            arguments["maxnreg"],
        )

    def compile(self, capability: int) -> Any:
        """Triton's compiled kernel for ``sm_<capability>``: its ``asm`` holds the PTX and the cubin."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, signature, constexprs=dict(self.constants), attrs=attributes)
        options = {"num_warps": self.warps, "num_ctas": self.ctas, "maxnreg": self.registers}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
