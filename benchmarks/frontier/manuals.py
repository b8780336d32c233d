"""The text of Debian's manuals, 300,000 words of debian-handbook and its like, fetched by apt-get."""

from __future__ import annotations

import html
import re
import subprocess
import tempfile
from pathlib import Path

__all__ = ["manuals"]

PACKAGES = (
    "debian-handbook",
    "debian-reference-en",
    "installation-guide-amd64",
    "debian-policy",
    "developers-reference",
)
PAGES = "usr/share/doc/**/*.html"


def manuals(folder: Path) -> list[str]:
    """The English pages' text, in the order of their names; from ``folder``, or fetched and written there."""
    path = folder / "manuals.txt"
    if not path.exists():
        path.write_text("\f".join(page for package in PACKAGES for page in _pages(package)))
    return path.read_text().split("\f")


def _pages(package: str) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["apt-get", "download", "-q", package], cwd=name, check=True)
        (archive,) = Path(name).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, name], check=True)
        files = sorted(file for file in Path(name).glob(PAGES) if file.is_file() and _english(file, Path(name)))
        return [_text(file.read_text(errors="replace")) for file in files]


def _english(file: Path, root: Path) -> bool:
    """Whether a page is English: those of other languages lie in a folder or end in a suffix of two letters."""
    parts = re.split(r"[/.]", str(file.relative_to(root / "usr/share/doc")).removesuffix(".html"))
    return all(part.startswith("en") for part in parts if re.fullmatch(r"[a-z]{2}([-_][A-Za-z]{2,4})?", part))


def _text(page: str) -> str:
    body = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", page)
    body = re.sub(r"</(p|li|h\d|tr|pre|dt|dd|div)>", "\n", body)
    lines = (line.strip() for line in html.unescape(re.sub(r"<[^>]+>", "", body)).replace("\f", " ").splitlines())
    return "\n".join(line for line in lines if line)
