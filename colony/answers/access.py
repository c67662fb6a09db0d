"""Who may ask what: whoever the file system lets open the unix socket may do everything; over TCP
the holder of a token may do what its role says.
"""

from __future__ import annotations

import hmac
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from pathlib import Path
from typing import Final

import structlog

from coral.wire.settings.files import read_regular

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_LEAST_BYTES: Final = 16
_MOST_BYTES: Final = 4096
_LOOK_EVERY_S: Final = 1.0
_LOG_EVERY_S: Final = 1.0
_BEARER: Final = "Bearer "


class Role(IntEnum):
    """What a caller may do; each may what those before it may."""

    NONE = 0
    VIEW = 1
    """Ask."""
    OPERATE = 2
    """Start and stop collectors, too."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file that holds one token."""

    name: str
    path: Path
    role: Role


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, for the log, and what it may do."""

    name: str
    role: Role


class WrongTokenError(Exception):
    """No token, or one that no file has."""


class Access:
    """Knows callers by the tokens in FILES, which are read again within a second after they change.
    With ANYONE, callers of TCP without a token may do that."""

    def __init__(
        self,
        files: Sequence[TokenFile] = (),
        anyone: Role = Role.NONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ValueError for a file that holds no token."""
        self._tokens = [_Token(each) for each in files]
        self._anyone = anyone
        self._clock = clock
        self._looked_at_s = clock()

    def caller(self, peer: str, authorization: str) -> Caller:
        """The caller at PEER, gRPC's name of it, with that header. Raises `WrongTokenError`."""
        self._look()
        if authorization:
            if not authorization.startswith(_BEARER):
                raise WrongTokenError("authorization: give `Bearer TOKEN`")
            digest = _digest(authorization.removeprefix(_BEARER).strip())
            found = None
            for token in self._tokens:  # all: it takes as long for any
                if hmac.compare_digest(token.digest, digest):
                    found = token.file
            if found:
                return Caller(f"token:{found.name}", found.role)
        if peer.startswith("unix"):
            return Caller("socket", Role.OPERATE)
        if authorization:
            raise WrongTokenError("authorization: the token is wrong")
        if self._anyone:
            return Caller("anyone", self._anyone)
        raise WrongTokenError("authorization: a token is missing")

    def _look(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_at_s >= _LOOK_EVERY_S:
            self._looked_at_s = now_s
            for token in self._tokens:
                token.refresh()


class Refusals:
    """Logs who was refused: one a second, since strangers decide how many there are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged_at_s = -_LOG_EVERY_S
        self._more = 0

    def log(self, peer: str, reason: str) -> None:
        """A caller at PEER, gRPC's name of it, was refused."""
        now_s = self._clock()
        if now_s - self._logged_at_s < _LOG_EVERY_S:
            self._more += 1
            return
        self._logged_at_s = now_s
        log.warning("a caller was refused", peer=peer, reason=reason, others_before=self._more)
        self._more = 0


class _Token:
    def __init__(self, file: TokenFile) -> None:
        self.file = file
        self.digest = _digest(_read(file))
        self._told = ""
        # Kubernetes mounts secrets like that, where only the container's users see them.
        with suppress(OSError):
            if (mode := file.path.stat().st_mode) & stat.S_IROTH:
                log.warning(
                    "every user may read the token", file=str(file.path),
                    mode=f"{stat.S_IMODE(mode):04o}", better="0600",
                )  # fmt: skip

    def refresh(self) -> None:
        """A file that holds no token any more leaves the last one in force."""
        try:
            self.digest = _digest(_read(self.file))
        except ValueError as error:
            if (why := str(error)) != self._told:
                self._told = why
                log.warning("the last token stays in force", reason=why)
        else:
            self._told = ""


def _read(file: TokenFile) -> str:
    try:
        text = read_regular(file.path, _MOST_BYTES, owners_alone=True).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"token {file.name}: {file.path}: {reason}") from error
    if len(text) < _LEAST_BYTES:
        raise ValueError(f"token {file.name}: {file.path}: it has fewer than {_LEAST_BYTES} bytes")
    return text


def _digest(token: str) -> bytes:
    return sha256(token.encode(errors="replace")).digest()
