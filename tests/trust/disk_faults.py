"""A disk that fails at every step: no room, input/output errors, interrupted calls, short writes.

    python tests/trust/disk_faults.py --seconds 60 [--seed N] [--json FILE]

Each trial runs a scenario (``scenarios.py``) in this process, with one fault at one of its steps (``steps.py`` counts
them), once or from then on. A writer may raise ``OSError`` or one of the cache's own errors, and nothing else. When the
disk is well again what is left is accounted for, record by record: what was durable is there, no label is wrong, and
running again ends as if nothing had happened.

All faults at all steps are tried in a random order, as many as there is time for. The last line is ``N faults, M
records accounted, 0 lost, 0 wrong``; the exit code is 1 if a record is lost or wrong, another exception comes, or
nothing was tried.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import scenarios
from steps import FAULTS, Steps, watched

from kdfast.cache.errors import CacheError


def steps_of(scenario: scenarios.Scenario, base: Path) -> int:
    """How many steps a scenario takes."""
    folder = base / "counted"
    shutil.copytree(scenario.start, folder)
    with watched(Steps(folder)) as steps:
        scenario.run(folder, lambda accepted, durable: None)
    shutil.rmtree(folder)
    return steps.count


def trial(scenario: scenarios.Scenario, fault: str, at: int, base: Path) -> scenarios.Account:
    """Run a scenario with a fault at a step, and look at what it leaves."""
    folder, event, durable = base / "trial", FAULTS[fault], [0]
    shutil.copytree(scenario.start, folder)
    failed = None
    try:
        try:
            with watched(Steps(folder, at, event[0], repeat=event[1])):
                scenario.run(folder, lambda accepted, kept: durable.__setitem__(0, kept))
        except (OSError, CacheError) as error:
            failed = error
        return scenario.settle(folder, durable[0])
    except Exception as error:
        return scenarios.Account(0, 0, 1, (f"{error!r} (after {failed!r})",))
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        made = scenarios.make_all(base / "scenarios")
        plan = [(s, fault, at) for s in made for fault in FAULTS for at in range(steps_of(s, base))]
        random.Random(arguments.seed).shuffle(plan)
        tried, total = 0, scenarios.Account()
        by_fault: dict[str, int] = {}
        for scenario, fault, at in plan:
            if time.monotonic() > until:
                break
            account = trial(scenario, fault, at, base)
            tried += 1
            by_fault[fault] = by_fault.get(fault, 0) + 1
            total = total.plus(account._replace(notes=()))
            for note in account.notes:
                print(f"{scenario.name}, {fault} at step {at}: {note}", flush=True)
    for fault, count in sorted(by_fault.items()):
        print(f"{fault}: {count}")
    print(f"{tried} of {len(plan)} faults at steps")
    if arguments.json:
        found = {"faults": tried, "all_faults": len(plan), "by_fault": by_fault, **total._asdict()}
        arguments.json.write_text(json.dumps(found, indent=1))
    print(f"{tried} faults, {total.records} records accounted, {total.lost} lost, {total.wrong} wrong")
    return int(not tried or total.lost > 0 or total.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
