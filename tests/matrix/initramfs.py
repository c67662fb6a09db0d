"""The guest's first file system: `init`, busybox, and the modules that reach the real one.

A cpio archive in the `newc` format, written here: it is a handful of files. The format is in the
kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import lzma
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

# What lies between the kernel and its root: the bus, the share, and the layer that takes writes.
_WANTED = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
_INIT = Path(__file__).with_name("init")


def initramfs(busybox: Path, modules: Path | None) -> bytes:
    """The archive for a kernel whose modules lie in MODULES (`.../lib/modules/RELEASE`), or one
    that has all it needs built in. LookupError names a module that is neither."""
    paths = list(_in_order(modules)) if modules else []
    names = [path.name.removesuffix(".xz") for path in paths]
    files = {
        "init": _INIT.read_bytes(),
        "bin/busybox": busybox.read_bytes(),
        "modules/order": "".join(f"{name}\n" for name in names).encode(),
    }
    for name, path in zip(names, paths, strict=True):
        content = path.read_bytes()
        files[f"modules/{name}"] = lzma.decompress(content) if path.suffix == ".xz" else content
    return _newc(files)


def _in_order(modules: Path) -> Iterator[Path]:
    """The wanted modules and those that they need, each after what it needs itself."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        needs[_name(path)] = [path, *needed.split()]
    built_in = {_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    given: set[str] = set()
    for wanted in _WANTED:
        if wanted in built_in:
            continue
        if wanted not in needs:
            raise LookupError(f"no module {wanted} in {modules}, and it is not built in")
        for path in reversed(needs[wanted]):  # modules.dep lists the nearest first
            if path not in given:
                given.add(path)
                yield modules / path


def _name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def _newc(files: dict[str, bytes]) -> bytes:
    directories = sorted({str(Path(name).parent) for name in files} - {"."})
    archive = bytearray()
    for number, (name, mode, content) in enumerate(
        [
            *((name, stat.S_IFDIR | 0o755, b"") for name in directories),
            # The console has to be there before init can mount anything.
            *((name, stat.S_IFREG | 0o755, content) for name, content in files.items()),
            ("TRAILER!!!", 0, b""),
        ],
        1,
    ):
        archive += _entry(number, name, mode, content)
    return bytes(archive)


def _entry(number: int, name: str, mode: int, content: bytes) -> bytes:
    path = name.encode() + b"\0"
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields: Iterable[int] = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + path) + _padded(content)


def _padded(block: bytes) -> bytes:
    return block + bytes(-len(block) % 4)
