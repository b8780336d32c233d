"""What is done with finished caches: merging, exporting, statistics and their plot."""
