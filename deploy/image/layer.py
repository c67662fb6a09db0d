"""A directory as the one layer of an image: the same files give the same bytes, whoever made them,
and when."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Final, NamedTuple

_LEVEL: Final = 6  # 9 takes three times as long and gains 0.5 %
_MODES: Final = {"tmp": 0o1777, "run/coral": 0o755, "var/cache/coral": 0o700}


class Layer(NamedTuple):
    """A compressed layer, and the digest of its tar, by which an image names it."""

    compressed: bytes
    diff_id: str
    bytes_unpacked: int


def archive(root: Path, timestamp_s: int = 0) -> bytes:
    """ROOT as a tar: in the order of the names, all of root's, at one time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(root.rglob("*"), key=lambda it: it.relative_to(root).parts):
            name = str(path.relative_to(root))
            member = tarfile.TarInfo(name)
            member.mtime = timestamp_s
            member.uname = member.gname = "root"
            if path.is_symlink():
                member.type, member.linkname, member.mode = (
                    tarfile.SYMTYPE,
                    str(path.readlink()),
                    0o777,
                )
                tar.addfile(member)
            elif path.is_dir():
                member.type, member.mode = tarfile.DIRTYPE, _MODES.get(name, 0o755)
                tar.addfile(member)
            else:
                content = path.read_bytes()
                member.size = len(content)
                member.mode = 0o755 if path.stat().st_mode & 0o111 else 0o644
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def layer(root: Path) -> Layer:
    """ROOT as a layer."""
    tar = archive(root)
    return Layer(gzip.compress(tar, _LEVEL, mtime=0), digest(tar), len(tar))


def digest(content: bytes) -> str:
    """The name of content in an image."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
