"""The table of prototypes that a capture is given, finds in its cache, or learns from its first rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdfast.cache.codecs.base import CaptureSource, Files
from kdfast.cache.selection.learn_prototypes import learn_prototypes
from kdfast.cache.selection.prototypes import PrototypeTable

__all__ = ["CHOSEN", "PROTOTYPES", "needs_table", "with_table"]

PROTOTYPES = 256  # that a capture learns by default
CHOSEN = "shapes.txt"  # holds the name of the table that those who learned one at the same time agreed on
TABLE_NAME = re.compile(r"shapes-.*\.safetensors")


def needs_table(options: Mapping[str, Any], files: Files) -> bool:
    """Whether a capture with these options has to learn a table first."""
    return not isinstance(options.get("prototypes"), PrototypeTable) and stored_table(files) is None


def with_table(options: Mapping[str, Any], source: CaptureSource, entries: int) -> dict[str, Any]:
    """``options`` with a table in place of the number of prototypes.

    Args:
        options: of the codec; ``prototypes`` is a table, a number, or not there.
        source: the capture's rows and files.
        entries: how many of a row's likeliest columns the labels hold beside the prototype, which then stands for the
            others alone.

    Raises:
        ValueError: ``prototypes`` is neither a table nor a positive number.
    """
    wanted = options.get("prototypes", PROTOTYPES)
    if isinstance(wanted, PrototypeTable):
        return dict(options)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"prototypes must be a table or a positive number, got {wanted!r}")
    table = stored_table(source.files)
    if table is None:
        rows, temperature = source.first_rows, source.temperatures[0]
        table = learn_prototypes(rows, count=wanted, entries=entries, temperature=temperature, rounds=1)
        table = _agreed(table, source.files)
    return {**options, "prototypes": table}


def stored_table(files: Files) -> PrototypeTable | None:
    """The table that an earlier session of the same capture has learned: resuming it takes the same one."""
    try:
        names = files.list()
    except FileNotFoundError:
        return None
    tables = [name for name in names if TABLE_NAME.fullmatch(name)]
    if CHOSEN in names:
        name = files.read_bytes(CHOSEN).decode("ascii", "replace").strip()
        return PrototypeTable.from_bytes(files.read_bytes(name)) if name in tables else None
    return PrototypeTable.from_bytes(files.read_bytes(tables[0])) if len(tables) == 1 else None


def _agreed(table: PrototypeTable, files: Files) -> PrototypeTable:
    """``table``, or that of another process which has learned one at the same time and was faster."""
    files.create()
    if files.exists(CHOSEN):
        return stored_table(files) or table
    if not files.exists(table.file_name):
        files.publish(table.file_name, [table.to_bytes()])
    if files.publish_new(CHOSEN, f"{table.file_name}\n".encode()):
        return table
    return stored_table(files) or table
