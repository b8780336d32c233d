"""The files of a cache, byte by byte: shards, manifest, keys and the storage that they lie in."""
