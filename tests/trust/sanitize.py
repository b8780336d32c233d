"""The kernels and the codec under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/trust/sanitize.py                # every op's and codec's tests, then the legs below
    python tests/trust/sanitize.py --seconds 60   # the differential fuzzer and rows between poisoned padding alone

The extension is built a second time, under build/sanitized. The last line counts what ran. Exit code 1: a sanitizer
stopped a process, or a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"
TESTS = [
    *(f"loss/test_{name}.py" for name in ("dense", "sparse", "prototype_rows", "layouts", "properties", "head_loss")),
    "cache/selection",
    *(f"cache/codecs/test_{name}.py" for name in ("entry_blocks", "entry_codecs", "odd_entries", "golden", "codecs")),
    "cache/read/test_packed.py",
]


def build() -> None:
    """Build the package with sanitizers. What has not changed since is not compiled again."""
    env = {**os.environ, "KDFAST_SANITIZE": "1", "KDFAST_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the sanitized build failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def run(arguments: list[str], isa: str | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process with the sanitized package in place of the installed one."""
    libraries = (_library("libasan.so"), _library("libstdc++.so"))
    env = {
        **os.environ,
        # Its own allocator would hide the ends of tensors from the sanitizer.
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": os.pathsep.join([str(BUILD / "lib"), str(ROOT / "tests"), str(ROOT / "docs")]),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
        **({} if isa is None else {"KDFAST_CPU_ISA": isa}),
    }
    # Not where the source tree's own package would be found first.
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT / "tests", capture_output=True, text=True, check=False
    )


def _library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def leg(name: str, arguments: list[str], isa: str | None = None) -> tuple[str, int]:
    """Run one process; its last line, and how many things it says it did. Raise ``SystemExit`` where it failed."""
    done = run(arguments, isa)
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    print(f"{name}: {last}", flush=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    counted = re.search(r"(\d+) (cases|passed|calls)", last)
    return last, int(counted[1]) if counted else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="only the short legs, for so long")
    parser.add_argument("--json", type=Path, help="write the counts there")
    args = parser.parse_args()
    build()
    here = Path(__file__).parent
    share = str((args.seconds or 600) / 2)
    counts = {}
    if args.seconds is None:
        for isa in ("avx512", "avx2", "baseline"):
            probe = run(["-c", "import kdfast, kdfast._C; print(kdfast.__file__)"], isa)
            if probe.returncode:
                print(f"tests, {isa}: this processor does not run it")
                continue
            tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *TESTS]
            counts[f"tests, {isa}"] = leg(f"tests, {isa}", tests, isa)[1]
    counts["padding"] = leg("padding", [str(here / "poisoned.py"), "--seconds", share])[1]
    counts["differential"] = leg("differential", [str(here / "differential.py"), "--seconds", share])[1]
    if args.json is not None:
        args.json.write_text(json.dumps(counts, indent=1))
    print(f"{sum(counts.values())} calls and tests under sanitizers, 0 failures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
