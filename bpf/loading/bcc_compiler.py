"""Compiles a program with bcc, and writes its instructions to the standard output.

`bpf.loading.bcc` runs it in a process of its own: the compiler needs 150 MB, which it never frees,
and a second. It is started by its path and imports nothing from the project. It reads JSON from the
standard input: `text` (C), `flags`, `functions`, `paths` (where else to look for bcc) and `parent`
(the process that has started it, with which it ends). It writes a JSON object with the instructions
of each function in hexadecimal; messages of the compiler go to the standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """The exit status: 0, or 1 if there is no bcc or it refuses the program."""
    job = json.load(sys.stdin)
    # However that process ends, and even if it has already.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"]:
        return 1
    sys.path.extend(job["paths"])
    try:
        from bcc import BPF  # noqa: PLC0415  the distribution's
    except ImportError as error:
        print(f"bcc cannot be imported: {error}", file=sys.stderr)
        return 1
    try:
        module = BPF(text=job["text"], cflags=job["flags"])
    except Exception as error:  # noqa: BLE001  bcc raises nothing narrower
        print(error, file=sys.stderr)
        return 1
    functions = {name: module.dump_func(name.encode()).hex() for name in job["functions"]}
    json.dump(functions, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
