"""Writing a cache: from records to sealed shards, crash-safe. Nothing here imports the reader."""
