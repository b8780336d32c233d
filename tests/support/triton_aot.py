"""Compiles the Triton kernels of one file for GPUs that are not there.

    python tests/support/triton_aot.py dense [everyday]

Prints one JSON line per variant and architecture, with what ptxas reports: registers, and bytes spilled. A process of
its own, since a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import triton.knobs

from kdfast.kernels.launch import HAS_CLUSTERS

CAPABILITIES = (80, 90, 100, 120)


def main() -> None:
    for variant in import_module(f"kdfast.kernels.{sys.argv[1]}").VARIANTS:
        if "everyday" in sys.argv and not variant.everyday:
            continue
        for capability in CAPABILITIES:
            if variant.ctas > 1 and not (HAS_CLUSTERS and capability in (90, 100)):
                continue
            ptx = variant.compile(capability).asm["ptx"]
            which = {"variant": variant.name, "capability": capability, "gathers": variant.gathers}
            print(json.dumps({**which, **report(ptx)}), flush=True)


def report(ptx: str) -> dict[str, int]:
    """What ptxas says of a kernel, and the width in bits of its widest load from global memory."""
    arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE).group(1)
    # The newer assembler where a Triton brings two: it knows every PTX version that Triton emits.
    tool = getattr(triton.knobs.nvidia, "ptxas_blackwell", triton.knobs.nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [tool, "-v", f"-arch={arch}", file, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    loads = [int(n or 1) * int(bits) for n, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)]
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "load_bits": max(loads, default=0),
    }


if __name__ == "__main__":
    main()
