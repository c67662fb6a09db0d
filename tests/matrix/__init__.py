"""The kernel tests on other kernels: `python -P -m tests.matrix`, or `make test-kernels`.

Each kernel boots under QEMU. It has this machine's root file system, read-only, below a writable
layer; a kernel for another processor has a root file system of its own. pytest runs inside, once
for each row of `rows.py`, and one table shows the results.
"""
