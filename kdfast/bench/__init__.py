"""Throughput benchmarks: ratios from one run with interleaved repeats, bytes counted, errors beside the times."""
