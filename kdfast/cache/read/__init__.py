"""From sealed shards to soft labels, in any order. Nothing here writes."""
