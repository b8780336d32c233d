"""From records to sealed shards, crash-safe. Nothing here reads a finished cache."""
