"""The prototypes that a capture with ``codec="prototype"`` learns before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from kdfast.cache.capture.batches import Fields
from kdfast.cache.format.storage import open_storage
from kdfast.cache.selection.learn_prototypes import learn_prototypes
from kdfast.cache.selection.prototypes import PrototypeTable

__all__ = ["PROTOTYPES", "can_learn", "prototypes_for", "stored_prototypes"]

PROTOTYPES = 256
LEARN_ROWS = 65536
ENTRIES = 3  # the codec's own default


def can_learn(loader: Iterable[Any]) -> bool:
    """Whether ``loader`` gives its batches again: learning takes several passes over the first ones."""
    return not isinstance(loader, Iterator)


def prototypes_for(
    path: Any,
    model: Callable[..., Any],
    loader: Iterable[Any],
    fields: Fields,
    *,
    vocab_size: int,
    temperature: float,
    options: dict[str, Any],
) -> PrototypeTable:
    """The table for a cache at ``path``: the one that is given, the one that is there, or a new one.

    ``options["prototypes"]`` is a table, or how many prototypes to learn from the first 65,536 rows. The teacher runs
    over these rows three times more; after that the table is frozen. Several writers of one cache need one table: learn
    it first, with ``learn_prototypes``.

    Raises:
        ValueError: a loader that can be iterated only once, or has no row.
    """
    wanted = options.get("prototypes", PROTOTYPES)
    if isinstance(wanted, PrototypeTable):
        return wanted
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"prototypes must be a table or a positive number, got {wanted!r}")
    found = stored_prototypes(path)
    if found is not None:
        return found
    if not can_learn(loader):
        raise ValueError("learning prototypes takes several passes over the first batches, and this loader has one")
    return learn_prototypes(
        lambda: _first_rows(model, loader, fields, vocab_size),
        count=wanted,
        entries=options.get("k", ENTRIES),
        temperature=temperature,
        rounds=1,
    )


def stored_prototypes(path: Any) -> PrototypeTable | None:
    """What an earlier session has learned: a capture that goes on must go on with it."""
    storage = open_storage(path)
    try:
        files = storage.list()
    except FileNotFoundError:
        return None
    names = [name for name in files if name.startswith("shapes-") and name.endswith(".safetensors")]
    return PrototypeTable.from_bytes(storage.read_bytes(names[0])) if len(names) == 1 else None


def _first_rows(model: Callable[..., Any], loader: Iterable[Any], fields: Fields, vocab_size: int) -> Iterator[Tensor]:
    rows = 0
    for batch in loader:
        for part in fields.parts(model, batch, fields.keys(batch)):
            logits = part.logits.reshape(-1, part.logits.shape[-1])[: LEARN_ROWS - rows, :vocab_size]
            rows += len(logits)
            yield logits
        if rows >= LEARN_ROWS:
            return
