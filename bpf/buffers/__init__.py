"""Reads what programs write: maps, ring buffers, perf buffers and iterators, in bulk."""
