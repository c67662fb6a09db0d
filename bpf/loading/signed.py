"""Which programs an installation accepts. The image and the Debian package are signed: beside the
programs they have `objects.sha256`, the list of all of them, its signature, and the public key. In
these, and wherever CORAL_BPF_KEY is a key, libbpf reads a program only if the list has its hash and
the key has signed the list. A checkout and a wheel have no key, and load what was built.

The key beside the list detects what changed after the installation was signed. Against a person who
can exchange the key as well, give the key from outside, in CORAL_BPF_KEY.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Final

from coral.bpf.loading import ed25519

ENV_KEY: Final = "CORAL_BPF_KEY"
ENV_OBJECT_DIR: Final = "CORAL_BPF_OBJECTS"
PROGRAMS: Final = Path(__file__).resolve().parent.parent / "programs"
_LIST, _SIGNATURE, _KEY = "objects.sha256", "objects.sha256.sig", "objects.pub"


class UnsignedError(ValueError):
    """The program is not one that the key's owner has signed."""


def required(programs: Path = PROGRAMS) -> bool:
    """Whether this installation loads signed programs only."""
    return bool(os.environ.get(ENV_KEY)) or (programs / _KEY).exists()


def check_environment(programs: Path = PROGRAMS) -> None:
    """Raises `UnsignedError` if the environment asks for other programs than the signed ones."""
    if os.environ.get(ENV_OBJECT_DIR) and required(programs):
        raise UnsignedError(
            f"{ENV_OBJECT_DIR} is set, but this installation loads only the programs that were "
            f"signed with it: unset {ENV_OBJECT_DIR}"
        )


def check(name: str, content: bytes, programs: Path = PROGRAMS) -> None:
    """Raises `UnsignedError`, if this installation loads signed programs only, and CONTENT is not
    the signed program NAME (`syscall_stats.bpf.o`)."""
    if not required(programs):
        return
    check_environment(programs)
    try:
        listed = (programs / _LIST).read_bytes()
        signature = (programs / _SIGNATURE).read_bytes()
        key = os.environ.get(ENV_KEY, "").encode() or (programs / _KEY).read_bytes()
    except OSError as error:
        raise UnsignedError(f"{error.filename} cannot be read ({error.strerror})") from error
    expected = _verified(listed, signature.strip(), key.strip()).get(name)
    if expected is None:
        raise UnsignedError(f"the signed {_LIST} has no {name}")
    if hashlib.sha256(content).hexdigest() != expected:
        raise UnsignedError("it is not the program that was signed")


@cache
def _verified(listed: bytes, signature: bytes, key: bytes) -> dict[str, str]:
    """The hashes of a list by name, once its signature is verified. One verification serves all
    programs: the arguments are the contents, not the names, of the files."""
    try:
        raw_signature, raw_key = (base64.b64decode(it, validate=True) for it in (signature, key))
    except binascii.Error as error:
        raise UnsignedError(f"the signature of {_LIST} or its key is not base64") from error
    if not ed25519.verify(raw_signature, listed, raw_key):
        raise UnsignedError(f"the signature of {_LIST} is not by the key of this installation")
    lines = (line.split("  ") for line in listed.decode().splitlines())
    return {name: hashed for hashed, name in lines}
