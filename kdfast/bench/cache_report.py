"""The cache benchmark's tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from kdfast.bench.cache import Row
from kdfast.bench.random_access import RandomAccess
from kdfast.bench.report import markdown, save

__all__ = ["COLUMNS", "LEGEND", "cells", "describe_access", "save_cache"]

COLUMNS = (
    "labels",
    "entries",
    "payload B",
    "files B",
    "fixed B",
    "noise",
    "bias",
    "KL",
    "tail",
    "write / lse",
    "decode tok/s",
)

LEGEND = """\
Per token, except `fixed B`: codec model and table of prototypes, once per cache (above as many tokens as it has bytes,
it is less than 1 B/token). `files B`: all files but these; what a shard has once is in it, and spread over these
few tokens. `noise`: E|label - p|^2. `bias`: |E label - p|^2, for draws from 8 of them, ± one standard error;
without draws it is the noise. `KL`: of the teacher's distribution from the label; * where only the tail's mass is
stored, and is spread evenly over the other columns; "inf" where columns are cut, with the teacher's probability of
these (below 1e-4, where precision alone takes it, such columns are left out instead); "-" for draws, which are no
estimate of p but of its gradient. `tail`: the resolution of what is not among the likeliest columns. `write / lse`:
select and encode over one torch.logsumexp of the same fp32 logits; `decode`: from packed bytes to SoftLabels; both
on one thread. Rivals: bytes of their labels by their published layouts, without containers; `rskd` from the
distinct ids it draws here."""


def cells(row: Row) -> tuple[str, ...]:
    """The cells of ``row`` under ``COLUMNS``."""
    drawn = row.bias_error > 0
    return (
        row.name,
        f"{row.entries:.1f}",
        f"{row.payload_bytes:.2f}",
        "" if row.file_bytes is None else f"{row.file_bytes:.2f}",
        "" if row.fixed_bytes is None else f"{row.fixed_bytes:,}",
        f"{row.noise:.2e}",
        f"{row.bias:.0e} ± {row.bias_error:.0e}" if drawn else f"{row.bias:.2e}",
        _kl(row),
        row.tail,
        "" if row.speed is None else f"{row.speed.write:.2f}",
        "" if row.speed is None else f"{row.speed.decode:,.0f}",
    )


def _kl(row: Row) -> str:
    if row.kl is None:
        return "-" if row.kl_of == "draws" else f"inf ({row.missed:.1%} cut)"
    return f"{row.kl:.4f}{'' if row.kl_of == 'the label' else ' *'}"


def describe_access(found: RandomAccess) -> str:
    """The results of ``random_access`` in words."""
    rates = ", ".join(f"{rate:,.0f} records/s in batches of {batch}" for batch, rate in found.records_per_s.items())
    grown = "" if found.anonymous_bytes is None else f"; {found.anonymous_bytes / 2**20:.1f} MiB of anonymous memory"
    return (
        f"Random access, {found.records:,} single-row records, {found.file_bytes / found.records:.1f} B each in files: "
        f"opened in {1e3 * found.open_seconds:.1f} ms; {rates}, one thread{grown}. The first gathers, which "
        f"check every block that they touch: {found.first_records_per_s:,.0f} records/s."
    )


def save_cache(rows: list[Row], access: RandomAccess | None, about: dict[str, str | int], folder: Path) -> Path:
    """Write ``cache-cpu-<date>.json`` to ``folder``, and a Markdown file beside it. Returns the former's path."""
    document = {
        **about,
        "results": [asdict(row) for row in rows],
        "random_access": None if access is None else asdict(access),
    }
    parts = [markdown(COLUMNS, map(cells, rows)), LEGEND, ", ".join(f"{key}: {value}" for key, value in about.items())]
    if access is not None:
        parts.append(describe_access(access))
    return save("cache-cpu", folder, document, "\n\n".join(parts))
