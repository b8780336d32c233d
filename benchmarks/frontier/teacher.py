"""The benchmark's teacher, kept in this experiment's folder."""

from __future__ import annotations

from pathlib import Path

from kdfast.bench.teacher import LENGTH, Corpus, load_teacher

__all__ = ["LENGTH", "Corpus", "load"]


def load(folder: Path) -> Corpus:
    """From ``folder``, or from the teacher, and into ``folder``."""
    return load_teacher(folder / "teacher.safetensors")
