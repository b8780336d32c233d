"""On a machine with a CUDA GPU: builds the extension, checks every kernel, and times them, in under nine minutes.

python benchmarks/gpu.py --out output/gpu [--skip build tests sanitizer] [--case kl-tau2 ...]

Results are written after every case, so that a run that is cut short leaves them. The table is printed last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# Tests that use the GPU where there is one.
TESTS = (
    "cuda_dense",
    "cuda_sparse",
    *(f"triton_{name}" for name in ("dense", "sparse", "ops", "scale", "select", "decode")),
)
SANITIZED = """
import torch
from kdfast import kd_loss
for columns in (1001, 40001):
    student = torch.randn(3, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kd_loss(student, torch.randn_like(student), torch.arange(3, device="cuda"), ce_weight=1.0).backward()
    torch.cuda.synchronize()
print("ran")
"""


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU is available to torch: there is nothing to measure")
    checks = {}
    steps = {"build": _build, "tests": _tests, "sanitizer": _sanitizer}
    for name, step in steps.items():
        if name not in options.skip:
            start = time.time()
            checks[name] = f"{step(options.out)} ({time.time() - start:.0f} s)"
            print(f"{name}: {checks[name]}", flush=True)
    _times(options, checks)


def _run(command: list[str | Path], log: Path, limit: int, **environment: str) -> tuple[int, str]:
    """Exit status and last line of the output, all of which is written to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
                env={**os.environ, **environment},
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    lines = log.read_text(errors="replace").strip().splitlines()
    return status, lines[-1] if lines else ""


def _build(out: Path) -> str:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", "."]
    toolkit = Path("/usr/local/cuda")  # torch would look here last, after the folder of an nvcc that may be a wrapper
    home = {"CUDA_HOME": str(toolkit)} if toolkit.is_dir() and "CUDA_HOME" not in os.environ else {}
    status, last = _run(command, out / "build.log", 240, KDFAST_CUDA="1", **home)
    if status:
        raise SystemExit(f"the build failed with {status}: {last}; see {out / 'build.log'}")
    return "passed"


def _tests(out: Path) -> str:
    files = [ROOT / "tests" / "kernels" / f"test_{name}.py" for name in TESTS]
    # Most of the time goes into compiling Triton's kernels.
    workers = ["-n", "8"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *files]
    status, last = _run(command, out / "tests.log", 240)
    return f"exit {status}: {last}"


def _sanitizer(out: Path) -> str:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is missing"
    found = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, sys.executable, "-c", SANITIZED]
        status, last = _run(command, out / f"{check}.log", 60)
        found.append(f"{check} exit {status}: {last}")
    return "; ".join(found)


def _times(options: argparse.Namespace, checks: dict[str, str]) -> None:
    sys.path.insert(0, str(ROOT))
    from kdfast.bench.gpu import ceilings, measure, save_gpu
    from kdfast.bench.gpu_cases import CASES

    machine, results = ceilings(), []
    path = None
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        if time.time() - options.start > options.limit:
            checks["cut"] = f"cases from {case.name} {case.rows} x {case.columns} on were left out: no time"
            break
        results.append(measure(case))
        path = save_gpu(results, machine, checks, options.out)
    if path is not None:
        print(path.with_suffix(".md").read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "gpu")
    parser.add_argument("--skip", nargs="*", default=[], choices=["build", "tests", "sanitizer"])
    parser.add_argument("--case", nargs="*", default=[])
    parser.add_argument("--limit", type=float, default=500, help="seconds after which no further case is begun")
    parser.set_defaults(start=time.time())
    return parser.parse_args()


if __name__ == "__main__":
    main()
