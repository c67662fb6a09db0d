"""Kernels to boot: Debian's, unpacked from their packages, or any by its path.

Nothing is installed: `apt-get download` and `dpkg-deb -x` fill build/kernels/NAME, whose `tree` is
what the packages would have put into the root file system. `root` is that file system where it
cannot be this machine's: see foreign.py.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tests.matrix.apt import KERNELS_DIRECTORY, KernelMissingError, dependencies, options_of, run
from tests.matrix.foreign import install_wheels, lay_out_project, unpack_root
from tests.support import ROOT

_MODULES: Final = Path("usr/lib/modules")


@dataclass(frozen=True)
class Machine:
    """What QEMU emulates, and where things lie in a guest."""

    qemu: str
    package: str
    """Debian's, that has QEMU for it."""
    options: tuple[str, ...]
    parameters: str
    """The kernel's."""
    project: Path = ROOT
    python: str = sys.executable
    debian: str = ""
    """Debian's name of the processor, where it is not this machine's: guests have a root file
    system of their own then."""
    wheels: str = ""
    """Python's name of it."""
    bpf: str = ""
    """That of the eBPF programs' headers."""
    slowness: int = 1
    """How much longer a row may take."""


# With a newer processor, Debian 12's QEMU 7.2 makes numpy's sort and sums go astray, by AVX we
# think.
X86: Final = Machine(
    "qemu-system-x86_64",
    "qemu-system-x86",
    ("-machine", "pc", "-cpu", "Nehalem"),
    "console=ttyS0 tsc=reliable",
)
ARM64: Final = Machine(
    "qemu-system-aarch64",
    "qemu-system-arm",
    ("-machine", "virt", "-cpu", "cortex-a72"),
    "console=ttyAMA0",
    project=Path("/coral"),
    python="/usr/bin/python3",
    debian="arm64",
    wheels="aarch64",
    bpf="arm64",
    slowness=4,
)


class _Debian(NamedTuple):
    """A series and Debian's meta package of it; the suite where this machine's own has it no longer
    or not yet; the machine that it is for."""

    series: str
    meta: str
    suite: str = ""
    machine: Machine = X86


_DEBIAN: Final = {
    "5.10": _Debian("5.10", "linux-image-amd64", "bullseye"),
    "6.1": _Debian("6.1", "linux-image-amd64"),
    "6.12": _Debian("6.12", "linux-image-6.12-amd64"),
    "arm64": _Debian("6.1", "linux-image-arm64", machine=ARM64),
}


@dataclass(frozen=True)
class Kernel:
    """What QEMU is given, and what the guest lays over the root file system."""

    name: str
    image: Path
    tree: Path
    machine: Machine = X86
    root: Path = Path("/")

    @property
    def modules(self) -> Path | None:
        """`.../lib/modules/RELEASE`; None where everything is built in."""
        return next((path for path in (self.tree / _MODULES).glob("*") if path.is_dir()), None)

    @property
    def busybox(self) -> Path:
        """A busybox that its processor runs, linked statically."""
        return self.root / "bin/busybox"


def machine_of(name: str) -> Machine:
    """The machine that a kernel is for."""
    return _DEBIAN[name].machine if name in _DEBIAN else X86


def kernel(name: str) -> Kernel:
    """A kernel by the name of its series, or the path of its image. Raises KernelMissingError."""
    if name in _DEBIAN:
        return _debian(name)
    image = Path(name)
    if not image.is_file():
        raise KernelMissingError(f"{name} is neither one of {', '.join(_DEBIAN)} nor a file")
    return _by_path(image.resolve())


def _by_path(image: Path) -> Kernel:
    """An image with lib/modules/RELEASE beside it; or with virtio over PCI, 9p and overlayfs built
    in, and nothing beside it."""
    tree = KERNELS_DIRECTORY / image.name / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    beside = image.parent / "lib/modules"  # as `make modules_install INSTALL_MOD_PATH=...` has it
    if beside.is_dir():
        shutil.copytree(beside, tree / _MODULES, symlinks=True)
    return Kernel(image.name, image, tree)


def _debian(name: str) -> Kernel:
    directory = KERNELS_DIRECTORY / name
    machine = machine_of(name)
    if not directory.exists():
        work = directory.with_name(f"{name}.unpacking")
        shutil.rmtree(work, ignore_errors=True)
        _unpack(_DEBIAN[name], work)
        if machine.debian:
            unpack_root(work / "root", machine.debian)
        work.rename(directory)
    tree, root = directory / "tree", Path("/")
    if machine.debian:
        root = directory / "root"
        install_wheels(root, machine.wheels)
        lay_out_project(tree / machine.project.relative_to("/"), machine.bpf)
    (image,) = (tree / "boot").glob("vmlinuz-*")
    return Kernel(name, image, tree, machine, root)


def _unpack(wanted: _Debian, directory: Path) -> None:
    tree = directory / "tree"
    tree.mkdir(parents=True)
    options = options_of(wanted.suite, wanted.machine.debian)
    run("apt-get", *options, "-qq", "update")
    image = next(iter(dependencies(options, wanted.meta)), "")
    release = image.removeprefix("linux-image-")
    if not re.match(re.escape(wanted.series) + r"\b", release):
        found = f"is {image}" if image else "is not in the sources of apt (bookworm-security?)"
        raise KernelMissingError(f"{wanted.series}: {wanted.meta} {found}")
    packages = [image, *_headers(options, release)]
    print(f"# unpacking {', '.join(packages)}", flush=True)
    run("apt-get", *options, "-qq", "download", *packages, cwd=directory)
    for package in directory.glob("*.deb"):
        run("dpkg-deb", "-x", package, tree)
        package.unlink()
    _merge_usr(tree)
    run("depmod", "-b", tree / "usr", release)


def _headers(options: Sequence[str], release: str) -> list[str]:
    headers = f"linux-headers-{release}"
    needed = dependencies(options, headers)
    return [headers, *(it for it in needed if re.match("linux-(headers|kbuild)-", it))]


def _merge_usr(tree: Path) -> None:
    """Moves /lib to /usr/lib, of which it is a link in the root file system it is laid over."""
    for path in (tree / "lib").glob("*"):
        target = tree / "usr/lib" / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    shutil.rmtree(tree / "lib", ignore_errors=True)
