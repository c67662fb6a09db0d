"""Kernels to boot: Debian's, unpacked from their packages, or any by its path.

Nothing is installed: `apt-get download` and `dpkg-deb -x` fill build/kernels/NAME, whose `tree` is
what the packages would have put into the root file system.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support import ROOT

KERNELS_DIRECTORY: Final = ROOT / "build/kernels"
_MODULES: Final = Path("usr/lib/modules")
# Debian's meta packages, and the suite where this machine's own has no longer or not yet got it.
_DEBIAN: Final = {
    "5.10": ("linux-image-amd64", "bullseye"),
    "6.1": ("linux-image-amd64", ""),
    "6.12": ("linux-image-6.12-amd64", ""),
}


class KernelMissingError(Exception):
    """A kernel that cannot be had here, and why."""


@dataclass(frozen=True)
class Kernel:
    """What QEMU is given, and what the guest lays over the root file system."""

    name: str
    image: Path
    tree: Path

    @property
    def modules(self) -> Path | None:
        """`.../lib/modules/RELEASE`; None where everything is built in."""
        return next((path for path in (self.tree / _MODULES).glob("*") if path.is_dir()), None)


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
    if not directory.exists():
        work = directory.with_name(f"{name}.unpacking")
        shutil.rmtree(work, ignore_errors=True)
        _unpack(name, work)
        work.rename(directory)
    (image,) = (directory / "tree/boot").glob("vmlinuz-*")
    return Kernel(name, image, directory / "tree")


def _unpack(name: str, directory: Path) -> None:
    meta, suite = _DEBIAN[name]
    tree = directory / "tree"
    tree.mkdir(parents=True)
    options = _options_of(suite) if suite else ()
    _run("apt-get", *options, "-qq", "update")
    image = next(iter(_dependencies(options, meta)), "")
    release = image.removeprefix("linux-image-")
    if not re.match(re.escape(name) + r"\b", release):
        found = f"is {image}" if image else "is not in the sources of apt (bookworm-security?)"
        raise KernelMissingError(f"{name}: {meta} {found}")
    headers = f"linux-headers-{release}"
    wanted = [
        image,
        headers,
        *(it for it in _dependencies(options, headers) if re.match("linux-(headers|kbuild)-", it)),
    ]
    print(f"# unpacking {', '.join(wanted)}", flush=True)
    _run("apt-get", *options, "-qq", "download", *wanted, cwd=directory)
    for package in directory.glob("*.deb"):
        _run("dpkg-deb", "-x", package, tree)
        package.unlink()
    _merge_usr(tree)
    _run("depmod", "-b", tree / "usr", release)


def _merge_usr(tree: Path) -> None:
    """Moves /lib to /usr/lib, of which it is a link in the root file system it is laid over."""
    for path in (tree / "lib").glob("*"):
        target = tree / "usr/lib" / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    shutil.rmtree(tree / "lib", ignore_errors=True)


def _dependencies(options: Sequence[str], package: str) -> list[str]:
    out = _run("apt-cache", *options, "depends", "--important", package)
    return re.findall(r"^\s+Depends: (\S+)$", out, re.MULTILINE)


def _options_of(suite: str) -> tuple[str, ...]:
    """What has apt know SUITE alone, from this machine's mirror, without touching its state."""
    state = KERNELS_DIRECTORY / "apt" / suite
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    listed = _run("apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)")
    mirror = re.search(r"^(?:bookworm|stable|oldstable) main (\S+)$", listed, re.MULTILINE)
    if not mirror:
        raise KernelMissingError(f"no mirror of Debian among apt's sources to read {suite} from")
    sources = state / "sources.list"
    sources.write_text(f"deb {mirror[1]} {suite} main\n")
    return (
        *("-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=-"),
        *("-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}"),
    )


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    if command[0] == "apt-get":  # apt's own user may not write where we are
        command = (command[0], "-o", "APT::Sandbox::User=root", *command[1:])
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if run.returncode:
        raise KernelMissingError(f"{' '.join(map(str, command))}: {run.stderr.strip()}")
    return run.stdout
