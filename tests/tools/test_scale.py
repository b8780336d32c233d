"""docs/scale.md quotes what its script prints."""

import os
import subprocess
import sys

from support import ROOT


def test_the_page_quotes_the_script():
    command = [sys.executable, ROOT / "benchmarks" / "scale.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    page = (ROOT / "docs" / "scale.md").read_text()
    for part in ran.stdout.strip().split("\n\n"):
        assert part in page
