"""Shards with contents that no writer makes and right checksums: what an attacker, not an accident, leaves."""

import numpy as np

from kdfast._C import crc32c
from kdfast.cache.format.container import pack, read_container


def repack(path, metadata=None, payload=None, **tables):
    """Change a shard's metadata, payload and tables in place; its cache loses its manifest, which would tell."""
    container = read_container(path)
    start, old = container.payload_start, {k: t.copy() for k, t in container.tables.items() if k != "padding"}
    if payload is None:
        payload = path.read_bytes()[start : start + container.payload_bytes]
    before, after = pack({**container.metadata, **(metadata or {})}, len(payload), {**old, **tables})
    path.write_bytes(before + payload + after)
    (path.parent / "manifest.json").unlink(missing_ok=True)


def forge(path, change):
    """Let ``change(payload, index)`` alter a shard's payload, a bytearray, in place; all checksums are right again."""
    container = read_container(path)
    start, index = container.payload_start, container.tables["block_index"].copy()
    payload = bytearray(path.read_bytes()[start : start + container.payload_bytes])
    change(payload, index)
    crcs = [crc32c(bytes(payload[begin : begin + length])) for begin, length in index[:, :2].tolist()]
    repack(path, payload=bytes(payload), block_index=index, block_crc=np.array(crcs, np.uint32))
