"""tests/programs/http/openssl.c, built with several forms of OpenSSL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from sysconfig import get_path
from typing import Final

from tests.support import ROOT, built

_SOURCE: Final = ROOT / "tests/programs/http/openssl.c"
_LINKED: Final = ("-lssl", "-lcrypto", "-ldl")


def _command(*links: str | Path) -> Callable[[Path], Sequence[str | Path]]:
    flags = ("-O2", "-Wall", "-Wextra", "-pthread")
    return lambda out: ["cc", *flags, _SOURCE, "-o", out, *links]


def openssl_program() -> Path:
    """With this machine's library."""
    return built("openssl", [_SOURCE], _command(*_LINKED))


def static_openssl_program() -> Path:
    """With OpenSSL in the program itself."""
    return built("openssl.static", [_SOURCE], _command("-static", *_LINKED))


def openssl_1_1_program() -> Path | None:
    """With OpenSSL 1.1, which the wheel of an old psycopg2 brings along; None where that is not
    installed, as it is for one kind of processor only."""
    directory = Path(get_path("platlib")) / "psycopg2_binary.libs"
    names = ("libssl", "libcrypto")
    libraries = [path for name in names for path in directory.glob(f"{name}-*.so.1.1")]
    if len(libraries) != len(names):
        return None
    found = (f"-Wl,-rpath,{directory}", "-Wl,--allow-shlib-undefined")
    return built("openssl.1.1", [_SOURCE], _command(*libraries, *found))
