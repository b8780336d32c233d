"""Shards with contents that no writer makes and right checksums: what an attacker, not an accident, leaves."""

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
