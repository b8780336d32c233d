"""The examples run, and learn; DDP and FSDP2 take the same steps."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from support import ROOT

EXAMPLES = ROOT / "examples"


def losses(name):
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2", EXAMPLES / name]
    assert shutil.which(command[0])
    done = subprocess.run([*command, "--steps", "21"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [float(x) for x in re.findall(r"step \d+: (\S+)", done.stdout)]


def test_ddp_and_fsdp_take_the_same_steps():
    found = [losses("train_ddp.py"), losses("train_fsdp2.py")]
    assert len(found[0]) == 3
    assert found[0][-1] < 0.8 * found[0][0]
    assert all(abs(a - b) < 2e-3 for a, b in zip(*found, strict=True))
