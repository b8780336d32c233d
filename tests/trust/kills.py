"""Processes that are killed at every step they take on their files, and at random.

    python tests/trust/kills.py --seconds 60 [--seed N] [--json FILE]

Each trial forks a process that has imported everything, lets it write, seal, resume, salvage, merge or save a
checkpoint, and has SIGKILL, SIGTERM or SIGINT strike it before, in the middle of, or after one step (``steps.py``
counts them), or after a random time. Then what is left is accounted for, record by record (``scenarios.py``): records
that were durable are there, no label differs from an undisturbed run's, and running again ends as if nothing had
happened. After SIGINT, every record that was accepted counts as durable.

All steps of all scenarios are tried in a random order, as many as there is time for; with time left, random moments.
The last line is ``N kills, M records accounted, 0 lost, 0 wrong``; the exit code is 1 if a record is lost or wrong, a
process hangs, or nothing could be tried.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import scenarios
from steps import Steps, signalled, watched

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("before", "torn", "after")
PATIENCE_S = 60.0


class Strike(NamedTuple):
    """What happens in a trial: a signal at a step, or, without a step, after a time."""

    scenario: int
    signal: int
    step: int | None
    when: str
    after_s: float = 0.0


class Progress:
    """Numbers that a child leaves and its parent reads, whatever becomes of the child."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 32)

    def note(self, accepted: int, durable: int) -> None:
        self._memory[:16] = struct.pack("qq", accepted, durable)

    def count(self, steps: int) -> None:
        self._memory[16:24] = struct.pack("q", steps)

    def read(self) -> tuple[int, int, int]:
        accepted, durable, steps = struct.unpack("qqq", self._memory[:24])
        return accepted, durable, steps


def fork(scenario: scenarios.Scenario, folder: Path, progress: Progress, strike: Strike | None) -> int:
    """Run a scenario in a child. Returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        event = None if strike is None or strike.step is None else signalled(strike.signal, strike.when)
        at = -1 if strike is None or strike.step is None else strike.step
        steps = Steps(folder, at, event)
        with watched(steps):
            scenario.run(folder, progress.note)
        progress.count(steps.count)
        code = 0
    except KeyboardInterrupt:
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int | None:
    """The child's wait status; None if it hangs, and is killed."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def trial(scenario: scenarios.Scenario, strike: Strike, base: Path) -> tuple[bool, scenarios.Account]:
    """Whether the process was struck, and what was found."""
    folder, progress = base / "trial", Progress()
    shutil.copytree(scenario.start, folder)
    try:
        child = fork(scenario, folder, progress, strike)
        if strike.step is None:
            time.sleep(strike.after_s)
            os.kill(child, strike.signal)
        status = wait(child)
        accepted, durable, _ = progress.read()
        if status is None:
            return True, scenarios.Account(0, 0, 1, ("it hangs",))
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            return True, scenarios.Account(0, 0, 1, ("it failed",))
        interrupted = strike.signal == signal.SIGINT and os.WIFEXITED(status)
        account = scenario.settle(folder, accepted if interrupted else durable)
        return os.WIFSIGNALED(status) or interrupted, account
    except Exception as error:
        return True, scenarios.Account(0, 0, 1, (f"cannot be gone on with: {error!r}",))
    finally:
        shutil.rmtree(folder)


def all_strikes(made: list[scenarios.Scenario], base: Path) -> list[Strike]:
    """Every signal at every step of every scenario, before, in and after it."""
    strikes = []
    for number, scenario in enumerate(made):
        folder, progress = base / "counted", Progress()
        shutil.copytree(scenario.start, folder)
        if wait(fork(scenario, folder, progress, None)) != 0:
            raise SystemExit(f"{scenario.name}: fails without a kill")
        shutil.rmtree(folder)
        for step in range(progress.read()[2]):
            strikes += [Strike(number, kind, step, when) for kind in SIGNALS for when in MOMENTS]
    return strikes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    until = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        made = scenarios.make_all(base / "scenarios")
        strikes = all_strikes(made, base)
        steps = len(strikes)
        draw.shuffle(strikes)
        kills, tried, total = 0, 0, scenarios.Account()
        by_name: dict[str, int] = {}
        while time.monotonic() < until:
            if tried < steps:
                strike = strikes[tried]
            else:
                after = draw.uniform(0, 0.2)
                strike = Strike(draw.randrange(len(made)), draw.choice(SIGNALS), None, "random", after)
            struck, account = trial(made[strike.scenario], strike, base)
            tried += 1
            name = made[strike.scenario].name
            kills += struck
            by_name[name] = by_name.get(name, 0) + struck
            total = total.plus(account._replace(notes=()))
            for note in account.notes:
                print(
                    f"{name}, {signal.Signals(strike.signal).name} {strike.when} step {strike.step}: {note}", flush=True
                )
    for name, count in sorted(by_name.items()):
        print(f"{name}: {count} kills")
    print(f"{min(tried, steps)} of {steps} strikes at steps, {max(0, tried - steps)} at random moments")
    if arguments.json:
        found = {"kills": kills, "tried": tried, "strikes": steps, "by_scenario": by_name, **total._asdict()}
        arguments.json.write_text(json.dumps(found, indent=1))
    print(f"{kills} kills, {total.records} records accounted, {total.lost} lost, {total.wrong} wrong")
    return int(not kills or total.lost > 0 or total.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
