"""Bearer tokens in files: read at the start, and again when a file changes.

A file is looked at no more than once a second. One that cannot be read any more, or holds no token
that would be accepted at the start, leaves its last token in force, with a warning.
"""

from __future__ import annotations

import hmac
import stat
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

import structlog

from coral.agent.config import Auth, ConfigError
from coral.agent.config_access import DEFAULT_TOKEN
from coral.wire.settings.files import read_with_mode

_MOST_TOKEN_BYTES: Final = 4096
_LEAST_TOKEN_BYTES: Final = 16
_LOOK_EVERY_S: Final = 1.0

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.audit")

_Stamp = tuple[int, int, int, int]


class Tokens:
    """The tokens of one configuration, by name; only their digests are kept."""

    def __init__(self, auth: Auth, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads every file. Raises `ConfigError`."""
        self._files = [_File(*each) for each in _files_of(auth)]
        self._clock = clock
        self._looked_at_s = clock()

    def __bool__(self) -> bool:
        return bool(self._files)

    def name_of(self, given: str) -> str:
        """The name of the token GIVEN; empty for one that no file has. Takes as long for any."""
        self._look()
        digest = _digest(given)
        found = ""
        for file in self._files:
            if hmac.compare_digest(file.digest, digest):
                found = file.name
        return found

    def _look(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_at_s >= _LOOK_EVERY_S:
            self._looked_at_s = now_s
            for file in self._files:
                file.refresh()


def _files_of(auth: Auth) -> Iterator[tuple[str, str, str]]:
    """The name, the path and the key in the configuration of each."""
    if auth.token_file:
        yield DEFAULT_TOKEN, auth.token_file, "auth.token_file"
    for index, token in enumerate(auth.tokens):
        yield token.name, token.file, f"auth.tokens[{index}].file"


class _File:
    """A token's file. KEY is where the configuration has it."""

    def __init__(self, name: str, path: str, key: str) -> None:
        self.name, self._path, self._key = name, Path(path), key
        self._stamp = _stamp_of(self._path)
        self.digest = _digest(read_token(self._path, key))

    def refresh(self) -> None:
        """Reads the file again if it has changed."""
        stamp = _stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.digest = _digest(read_token(self._path, self._key))
        except ConfigError as error:
            log.warning("the last token stays in force", reason=str(error))
        else:
            log.info("token read again", file=str(self._path))


def _digest(token: str) -> bytes:
    return sha256(token.encode(errors="replace")).digest()


def _stamp_of(path: Path) -> _Stamp | None:
    """What changes when the file does; None where it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def read_token(path: Path, key: str) -> str:
    """The token in the file at PATH, which the configuration has at KEY. Raises `ConfigError`."""
    try:
        content, mode = read_with_mode(path, _MOST_TOKEN_BYTES)
        token = content.decode().strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path}: not UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from error
    shown = f"{stat.S_IMODE(mode):04o}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{key}: {path}: others than its owner may write it (mode {shown}), and "
            "could choose the token; give a file of mode 0600"
        )
    if not token:
        raise ConfigError(f"{key}: {path} is empty")
    if (size_bytes := len(token.encode())) < _LEAST_TOKEN_BYTES:
        raise ConfigError(
            f"{key}: {path}: the token has {size_bytes} bytes; give at least "
            f"{_LEAST_TOKEN_BYTES}, such as from `openssl rand -hex 32`"
        )
    # Kubernetes mounts secrets like that, where only the container's users see them.
    if mode & stat.S_IROTH:
        log.warning("every user may read the token", file=str(path), mode=shown, better="0600")
    return token
