"""`python -P -m deploy.image.lock`: writes requirements.txt anew, with the newest versions that the
project allows, and the hashes of their wheels for both processors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Final

from deploy.image.environment import REQUIREMENTS, ROOT
from deploy.image.oci import ARCHITECTURES

_HEAD: Final = """\
# Made by `python -P -m deploy.image.lock`: what the image and the Debian package install, for
# x86_64 and aarch64, so that the same sources make the same image.
"""
_GLIBC: Final = ("2_28", "2_27", "2_17")  # minor versions of the platforms that wheels name


def main() -> None:
    """Asks pip, once for each processor, and writes what it would install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [requirement.partition(";")[0].strip() for requirement in project["dependencies"]]
    hashes = defaultdict[str, set[str]](set)
    for machine in ARCHITECTURES:
        for pin, hashed in _resolved(wanted, machine):
            hashes[pin].add(hashed)
    lines = (
        " \\\n    ".join((pin, *(f"--hash={it}" for it in sorted(hashes[pin]))))
        for pin in sorted(hashes)
    )
    REQUIREMENTS.write_text(_HEAD + "".join(f"{line}\n" for line in lines))


def _resolved(wanted: list[str], machine: str) -> list[tuple[str, str]]:
    """What pip would install on MACHINE: `name==version`, and the hash of the wheel."""
    platforms = [f"--platform=manylinux_{version}_{machine}" for version in _GLIBC]
    with tempfile.TemporaryDirectory() as work:
        report = Path(work, "report.json")
        pip = (sys.executable, "-P", "-m", "pip", "install", "--quiet", "--dry-run")
        for_it = ("--only-binary=:all:", "--python-version=3.11", "--implementation=cp")
        where = ("--ignore-installed", f"--target={work}/none", f"--report={report}")
        subprocess.run(
            [*pip, *for_it, *platforms, f"--platform=manylinux2014_{machine}", *where, *wanted],
            check=True,
        )
        installed = json.loads(report.read_text())["install"]
    return [
        (
            f"{_normal(it['metadata']['name'])}=={it['metadata']['version']}",
            it["download_info"]["archive_info"]["hash"].replace("=", ":"),
        )
        for it in installed
    ]


def _normal(name: str) -> str:
    """The name of a distribution as indexes write it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
