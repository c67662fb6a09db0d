"""The kernel tests on other kernels: `python -P -m tests.matrix`, or `make test-kernels`.

Each kernel boots under QEMU with this machine's root file system, read-only, under a layer of its
own; one for another processor with a root file system that is made for it. pytest runs inside, once
for every row of `rows.py`, and one table says what came of it.
"""
