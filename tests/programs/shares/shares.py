"""Spends CPU time in named functions, as `profiled shares` does: `shares.py MILLISECONDS`. It reads
a byte first, and prints the truth."""

from __future__ import annotations

import sys
import time


def spend_most(ns: int) -> int:
    began = time.thread_time_ns()
    while time.thread_time_ns() < began + ns:
        for _ in range(500):
            pass
    return time.thread_time_ns() - began


def spend_some(ns: int) -> int:
    began = time.thread_time_ns()
    while time.thread_time_ns() < began + ns:
        for _ in range(500):
            pass
    return time.thread_time_ns() - began


def spend_little(ns: int) -> int:
    began = time.thread_time_ns()
    while time.thread_time_ns() < began + ns:
        for _ in range(500):
            pass
    return time.thread_time_ns() - began


def descend(depth: int, milliseconds: int, spent: list[int]) -> int:
    if depth:
        # By way of C, each time.
        return max([depth], key=lambda depth: descend(depth - 1, milliseconds, spent))
    for _ in range(milliseconds // 10):
        spent[0] += spend_most(7_000_000)
        spent[1] += spend_some(2_000_000)
        spent[2] += spend_little(1_000_000)
    return 0


totals = [0, 0, 0]
sys.stdin.read(1)
descend(8, int(sys.argv[1]), totals)
for name, total_ns in zip(("most", "some", "little"), totals, strict=True):
    print(f"spend_{name} {total_ns}")
