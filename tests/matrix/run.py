"""Runs rows: here, or in a guest that boots, runs several one after another, and powers off."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.matrix.apt import KERNELS_DIRECTORY
from tests.matrix.initramfs import initramfs
from tests.matrix.kernels import Kernel, Machine
from tests.matrix.report import Outcome, outcome
from tests.matrix.rows import HOST, Row
from tests.support import ROOT

GUEST_MEMORY_MIB: Final = 2048
_BOOT_LIMIT_S: Final = 90
_ROW_LIMIT_S: Final = 2400  # bcc compiles for ten minutes there
_PATIENCE: Final = 5
_RESULTS_IN_GUEST: Final = Path("/run/results")
_HIDE_BTF: Final = 'mount -t tmpfs none /sys/kernel/btf && exec "$@"'
_SAID: Final = re.compile(
    r"matrix: (?:booted (?P<release>\S+)|row (?P<row>\d+) ended with (?P<status>\d+))"
)
_ERROR: Final = re.compile(
    r"(matrix|mount|insmod): .*|Kernel panic.*|.*BUG: .*|Oops: .*|qemu-\S+: (?!warning).*"
)

Say = Callable[[str], None]


def missing_packages(machines: Iterable[Machine]) -> list[str]:
    """The Debian packages that guests on MACHINES need and that are not installed."""
    needed = {"busybox-static": "busybox", "kmod": "depmod"}
    needed |= {machine.package: machine.qemu for machine in machines}
    return [package for package, program in needed.items() if not shutil.which(program)]


async def run_here(row: Row, say: Say) -> Outcome:
    """The row on this machine's own kernel."""
    directory = results_of(HOST)
    started = time.monotonic()
    with (directory / "0.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *_command(
                row,
                *(directory / "0.xml", sys.executable, "-p", "no:cacheprovider"),
                patience=1,
            ),
            cwd=ROOT,
            env={**os.environ, **_knobs(row)},
            stdout=log,
            stderr=log,
        )
        status = await process.wait()
    result = outcome(
        row, platform.release(), directory / "0", status, seconds=time.monotonic() - started
    )
    say(str(result))
    return result


async def run_guest(name: str, kernel: Kernel, rows: Sequence[Row], say: Say) -> list[Outcome]:
    """Boots KERNEL and runs ROWS in the guest. A row that did not finish has an outcome, too."""
    directory = results_of(name)
    (directory / "rows.sh").write_text(_script(kernel.machine, rows))
    archive = KERNELS_DIRECTORY / f"{name}.cpio"
    archive.write_bytes(initramfs(kernel.busybox, kernel.modules))
    process = await asyncio.create_subprocess_exec(
        *_qemu(kernel, archive, directory),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    guest = _Guest(rows, directory, say)
    assert process.stdout
    why = "the guest ended"
    row_limit_s = _ROW_LIMIT_S * kernel.machine.slowness
    try:
        with (directory / "console.log").open("wb", buffering=0) as console:
            async with asyncio.timeout(_BOOT_LIMIT_S) as limit:
                async for line in process.stdout:
                    console.write(line)
                    if guest.hear(line.decode(errors="replace")):
                        limit.reschedule(asyncio.get_running_loop().time() + row_limit_s)
    except TimeoutError:
        why = f"timed out after {row_limit_s if guest.release else _BOOT_LIMIT_S} s"
    finally:
        if not process.stdout.at_eof():
            process.kill()
        await process.wait()
        archive.unlink()
    if not guest.release:
        why = f"did not boot: {why}"
    return guest.outcomes(f"{why}, see {(directory / 'console.log').relative_to(ROOT)}")


class _Guest:
    """The state of a guest, from its console."""

    def __init__(self, rows: Sequence[Row], directory: Path, say: Say) -> None:
        self.release = ""
        self._rows = rows
        self._directory = directory
        self._say = say
        self._since = time.monotonic()
        self._last_words = ""
        self._found: dict[int, Outcome] = {}

    def hear(self, line: str) -> bool:
        """Reads a line of the console; whether it means progress."""
        if said := _SAID.search(line):
            if said["release"]:
                self.release = said["release"]
                self._say(f"{self._rows[0].kernel}: booted {self.release} in {self._lap():.0f} s")
            else:
                self._ended(int(said["row"]), int(said["status"]))
            return True
        if error := _ERROR.search(line):
            self._last_words = self._last_words or error[0].strip()
        return False

    def _lap(self) -> float:
        now = time.monotonic()
        lap, self._since = now - self._since, now
        return lap

    def _ended(self, number: int, status: int) -> None:
        found = outcome(
            self._rows[number],
            self.release,
            self._directory / str(number),
            status,
            seconds=self._lap(),
        )
        self._found[number] = found
        self._say(str(found))

    def outcomes(self, why: str) -> list[Outcome]:
        """An outcome for every row; WHY explains those that did not finish."""
        words = f"{why} ({self._last_words})" if self._last_words else why
        for number, row in enumerate(self._rows):
            if number not in self._found:
                self._found[number] = Outcome(row, self.release, (), words, self._lap())
                self._say(str(self._found[number]))
        return [self._found[number] for number in range(len(self._rows))]


def results_of(name: str) -> Path:
    """An empty directory for the results of one guest."""
    directory = KERNELS_DIRECTORY / "results" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def guest_environment() -> dict[str, str]:
    """The environment of every process in a guest."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TMPDIR": "/run/tmp",
        "CORAL_TEST_PATIENCE": str(_PATIENCE),
        "CORAL_TEST_OWN_MACHINE": "1",
    }


def _knobs(row: Row) -> Mapping[str, str]:
    return {"CORAL_LOADER": row.loader, "CORAL_WITHOUT": row.without}


def _command(
    row: Row,
    junit: Path,
    python: str,
    *more: str,
    patience: int,
    slowness: int = 1,
) -> list[str]:
    """pytest for a row, without what the environment alone cannot take away."""
    limit = row.memlock_kib
    return [
        *(("prlimit", f"--memlock={limit << 10}:{limit << 10}") if limit else ()),
        *(("unshare", "--mount", "sh", "-c", _HIDE_BTF, "sh") if row.hide_btf else ()),
        # An interrupted pytest still writes its report.
        *("timeout", "--signal=INT", "--kill-after=20", str(_ROW_LIMIT_S * slowness - 30)),
        *(python, "-P", "-m", "pytest", "--color=no", "--tb=short"),
        *("--durations=15", "-o", f"timeout={120 * patience}", f"--junit-xml={junit}"),
        *more,
        *row.tests,
    ]


def _script(machine: Machine, rows: Sequence[Row]) -> str:
    lines = [f"cd {shlex.quote(str(machine.project))}"]
    for number, row in enumerate(rows):
        lines += [
            _line(machine, row, number),
            f'echo "matrix: row {number} ended with $?"',
        ]
    return "\n".join([*lines, ""])


def _line(machine: Machine, row: Row, number: int) -> str:
    """A command of the guest: pytest for a row."""
    # A guest of another processor runs a copy of the project, which is not installed.
    source = {"PYTHONPATH": str(Path(machine.project) / "src")}
    environment = {**guest_environment(), **source, **_knobs(row)}
    command = [
        *("env", "-i", *(f"{name}={value}" for name, value in environment.items())),
        *_command(
            row,
            _RESULTS_IN_GUEST / f"{number}.xml",
            machine.python,
            *("-p", "no:cacheprovider"),
            patience=_PATIENCE,
            slowness=machine.slowness,
        ),
    ]
    return f"{shlex.join(command)} >{_RESULTS_IN_GUEST / f'{number}.log'} 2>&1"


def _qemu(kernel: Kernel, archive: Path, results: Path) -> list[str]:
    # With one thread per CPU, Debian 12's QEMU 7.2 may translate code while another CPU patches it,
    # and keep it half patched: stray int3 traps, once tracepoints come and go. One thread serves
    # both CPUs in turn.
    machine = kernel.machine
    return [
        *(machine.qemu, "-no-user-config", "-nodefaults", *machine.options),
        *("-accel", "tcg,thread=single"),
        *("-smp", "2", "-m", str(GUEST_MEMORY_MIB)),
        *("-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(archive)),
        *("-append", f"{machine.parameters} quiet panic=-1 mitigations=off"),
        *_share("host", kernel.root, readonly=True),
        *_share("kernel", kernel.tree, readonly=True),
        *_share("results", results, readonly=False),
    ]


def _share(tag: str, path: Path, *, readonly: bool) -> tuple[str, str]:
    quoted = str(path).replace(",", ",,")
    options = f"local,path={quoted},mount_tag={tag},security_model=none,multidevs=remap"
    return "-virtfs", options + (",readonly=on" if readonly else "")
