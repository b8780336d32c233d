"""How much memory an import takes for a piece of a file that says so itself: compressed data can claim anything."""

from __future__ import annotations

from kdfast.cache.errors import CacheError

__all__ = ["MAX_BYTES", "ExpansionError", "most_bytes"]

MAX_BYTES = 2**28  # of one piece, or ``RATIO`` times its bytes in the file where that is more
RATIO = 64


class ExpansionError(CacheError):
    """A piece of a file would take more memory than an import's ``max_bytes``. The message says which, and how much."""

    @classmethod
    def of(cls, what: str, wanted: int | None, most: int) -> ExpansionError:
        size = f"takes {wanted:,} bytes" if wanted is not None else "goes on"
        return cls(
            f"{what}: {size} once it is unpacked, where max_bytes allows {most:,}; if you know where the file comes "
            f"from, pass a larger max_bytes"
        )


def most_bytes(max_bytes: int | None, stored: int) -> int:
    """What a piece of ``stored`` bytes may take: ``max_bytes``, or by default what real captures stay far below."""
    return max(MAX_BYTES, RATIO * stored) if max_bytes is None else max_bytes
