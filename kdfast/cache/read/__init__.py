"""Reading a cache: from sealed shards to soft labels, in any order. Nothing here imports the writer."""
