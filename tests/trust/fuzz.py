"""Fuzzing the native decoders: python tests/trust/fuzz.py --seconds 60

It builds each harness of ``native`` with clang, libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer, and runs
it from the golden caches' blocks and from what ``corpus/`` holds. An input that crashes one goes into ``corpus/``, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = {
    "entry_block": ["codec/entry_decoder.cpp", "codec/entry_encoder.cpp"],
    "row_block": ["codec/row_block.cpp"],
    "top_rows": ["codec/top_rows.cpp"],
    "io": ["io/crc32c.cpp", "io/gather.cpp"],
}
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
LIMITS = ["-max_len=4096", "-rss_limit_mb=1500", "-malloc_limit_mb=256", "-timeout=10", "-print_final_stats=1"]


def find_clang() -> str:
    for name in ("clang++", *(f"clang++-{version}" for version in range(20, 13, -1))):
        if path := shutil.which(name):
            return path
    sys.exit("clang++ with libFuzzer is needed: apt-get install clang libclang-rt-14-dev (or of your version)")


def build(clang: str, name: str, folder: Path) -> Path:
    binary = folder / f"fuzz_{name}"
    sources = [HERE / "native" / f"fuzz_{name}.cpp", *(ROOT / "csrc" / source for source in SOURCES[name])]
    folders = [f"-I{ROOT / 'csrc' / part}" for part in ("codec", "io")]
    command = [clang, *FLAGS, *folders, f"-I{HERE / 'native'}", *map(str, sources), "-o", str(binary)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        hint = "apt-get install libclang-rt-14-dev (or of your version)" if "clang_rt" in made.stderr else ""
        sys.exit(f"{made.stderr[-3000:]}\nfuzz_{name} cannot be built {hint}")
    return binary


def run(binary: Path, name: str, seeds: Path, models: Path, seconds: int, executions: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as found, tempfile.TemporaryDirectory() as crashes:
        kept = HERE / "corpus" / name
        folders = [found, str(seeds / name), *([str(kept)] if kept.exists() else [])]
        amount = [f"-runs={executions}"] if executions else [f"-max_total_time={seconds}"]
        command = [str(binary), *folders, *LIMITS, *amount, f"-artifact_prefix={crashes}/"]
        environment = {**os.environ, "KDFAST_FUZZ_MODELS": str(models)}
        out = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        count = re.search(r"number_of_executed_units:\s*(\d+)", out.stderr)
        inputs = sorted(Path(crashes).iterdir())
        for crash in inputs:
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(crash, kept / crash.name[:40])
        if out.returncode:
            print(out.stderr[-4000:], file=sys.stderr)
        failures = max(len(inputs), int(out.returncode != 0))
        return {"harness": name, "executions": int(count[1]) if count else 0, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for all harnesses together")
    parser.add_argument("--executions", type=int, default=0, help="of each harness, however long they take")
    parser.add_argument("--only", choices=sorted(SOURCES), help="one harness")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    options = parser.parse_args()
    names = [options.only] if options.only else list(SOURCES)
    clang, results = find_clang(), []
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        subprocess.run([sys.executable, str(HERE / "seeds.py"), str(made)], check=True)
        for name in names:
            binary = build(clang, name, made)
            seconds = max(1, options.seconds // len(names))
            results.append(run(binary, name, made / "seeds", made / "models", seconds, options.executions))
            print("{harness}: {executions} executions, {failures} failures".format(**results[-1]), flush=True)
    executions = sum(int(str(result["executions"])) for result in results)
    failures = sum(int(str(result["failures"])) for result in results)
    if options.json:
        options.json.write_text(
            json.dumps({"executions": executions, "failures": failures, "harnesses": results}, indent=1)
        )
    print(f"{executions} executions, {failures} failures")
    return 1 if failures or not all(result["executions"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
