"""One compiled form of a Triton kernel, so that every form that a launch may ask for can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Variant"]


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
        ctas: programs that share a row, as one thread-block cluster.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    ctas: int = 1

    def compile(self, capability: int) -> Any:
        """Triton's compiled kernel for ``sm_<capability>``: its ``asm`` holds the PTX and the cubin."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, signature, constexprs=dict(self.constants), attrs=attributes)
        options = {"num_warps": self.warps, "num_ctas": self.ctas}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
