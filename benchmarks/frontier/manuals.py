"""The text of Debian's manuals, some hundred thousand words: debian-handbook and its like, fetched by apt-get."""

from __future__ import annotations

import html
import re
import subprocess
import tempfile
from pathlib import Path

__all__ = ["manuals"]

PACKAGES = ("debian-handbook", "debian-reference-en", "debian-policy", "developers-reference")
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
        files = sorted(Path(name).glob(PAGES))
        return [_text(file.read_text(errors="replace")) for file in files if _english(file)]


def _english(file: Path) -> bool:
    """Whether a page is English: other languages have folders or endings of two letters."""
    others = re.compile(r"(^|[./])(?!en)[a-z]{2}([-_][A-Za-z]{2,4})?([./]|$)")
    return not others.search(str(file.relative_to(file.parents[-1])).split("usr/share/doc/")[1].removesuffix(".html"))


def _text(page: str) -> str:
    body = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", page)
    body = re.sub(r"</(p|li|h\d|tr|pre|dt|dd|div)>", "\n", body)
    lines = (line.strip() for line in html.unescape(re.sub(r"<[^>]+>", "", body)).replace("\f", " ").splitlines())
    return "\n".join(line for line in lines if line)
