"""The unix sockets that the configuration names: a path, who may open it, and what it is called."""

from __future__ import annotations

import grp
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

ADMIN: Final = "admin"
VIEW: Final = "view"
ACCEPTED: Final = "give unix:PATH or HOST:PORT"
MAX_PORT: Final = 65535  # gRPC accepts a greater one, and listens on its lower 16 bits

_MOST_PATH_BYTES: Final = 107  # of `sun_path`, without the NUL that ends it, unix(7)
_OPTIONS: Final = ("group", "mode", "name")
_OWNER_ALONE: Final = 0o600
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_MODE: Final = re.compile(r"0?6[0246]{2}")


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """`unix:PATH?mode=0660&group=NAME&name=NAME`, of which the path alone is needed.

    `name` is what roles know callers of this socket by; without one, a socket that only its owner
    may open is `admin`, any other `view`."""

    path: Path
    mode: int = _OWNER_ALONE
    group: str = ""
    name: str = ADMIN

    @property
    def gid(self) -> int:
        """The group's number, or -1 for the agent's own. Raises ValueError for one that is not
        known here."""
        if not self.group:
            return -1
        try:
            return int(self.group) if self.group.isdigit() else grp.getgrnam(self.group).gr_gid
        except (KeyError, OverflowError):
            raise ValueError(
                f"unix:{self.path}: this machine has no group {self.group!r}"
            ) from None


def is_unix(address: str) -> bool:
    """Whether ADDRESS is a unix socket's."""
    return address.startswith("unix:")


def unix_address(address: str) -> UnixAddress:
    """ADDRESS taken apart. Raises ValueError with what is wrong, and what is accepted."""
    text, question, query = address.removeprefix("unix:").partition("?")
    if not text:
        raise ValueError(f"{address!r} has no path; {ACCEPTED}")
    if (size_bytes := len(os.fsencode(text))) > _MOST_PATH_BYTES:
        raise ValueError(
            f"unix:{text}: the path has {size_bytes} bytes; give at most {_MOST_PATH_BYTES}, the "
            "kernel's limit for the path of a unix socket"
        )
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown or (question and len(pairs) != len(options)) or (question and not pairs):
        what = f"{unknown[0]!r} is not an option" if unknown else "an option is missing, or twice"
        raise ValueError(f"{address}: {what}; after the ? give {', '.join(_OPTIONS)}, each once")
    mode = options.get("mode", "0600")
    if not _MODE.fullmatch(mode):
        raise ValueError(f"{address}: mode={mode} is not accepted; give 0600, 0660 or 0666")
    default = ADMIN if int(mode, 8) == _OWNER_ALONE else VIEW
    name = options.get("name", default)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{address}: name={name} is not accepted; give small letters, digits and hyphens"
        )
    return UnixAddress(Path(text), int(mode, 8), options.get("group", ""), name)


def host_and_port(address: str) -> tuple[str, int] | None:
    """The two parts of `HOST:PORT`; None for anything else. An IPv6 address is in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > MAX_PORT:
        return None
    return host, int(port)
