"""Benchmarks: every figure is a ratio to a peer in one run, after a correctness check."""
