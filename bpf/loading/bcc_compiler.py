"""Compiles a program with bcc, and writes its instructions to the standard output.

Run by `bpf.bcc`, in a process of its own: the compiler takes 150 MB and a second, and gives neither
back. It is started by its path and imports nothing of ours. It reads from the standard input, as
JSON, `text` (C), `flags`, `functions` and `paths` (where else to look for bcc), and writes a JSON
object of each function's instructions in hexadecimal; what the compiler has to say goes to the
standard error.
"""

from __future__ import annotations

import json
import sys


def main() -> int:
    """The exit status: 0, or 1 where there is no bcc or it refuses the program."""
    job = json.load(sys.stdin)
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
