"""HTTP's basic authentication (RFC 7617) with bcrypt's hashes.

A hash takes 50 to 200 ms of a CPU. So it runs in a thread, one at a time, and verdicts are kept:
what is kept is a digest with a key that only this process has, not the password.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from coral.collectors.runner import in_thread

_MOST_KEPT: Final = 256
_MOST_BYTES: Final = 72  # of a password that bcrypt uses; Go's refuses longer ones too
# Of no password, with a usual cost: an unknown name takes about as long as a known one.
_NOBODY: Final = b"$2b$10$C6UzMDM.H6dfI/f/IKcEeO7ZUl1aI0oVYHYRkr6mWmqfHc7dHyUzm"


class Passwords:
    """Whether requests carry the name and the password of one of a set of users."""

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._verdicts: OrderedDict[bytes, bool] = OrderedDict()
        self._turn = asyncio.Lock()

    async def accept(self, header: bytes | None, users: Mapping[str, bytes]) -> bool:
        """Whether HEADER, as of `Authorization`, is of one of USERS, whose hashes are by name."""
        given = _name_and_password(header)
        if given is None:
            return False
        name, password = given
        hashed = users.get(name, _NOBODY)
        digest = hashlib.blake2b(key=self._key)
        for part in (name.encode(), hashed, password):
            digest.update(len(part).to_bytes(8, "big") + part)
        kept = digest.digest()
        if (verdict := self._verdicts.get(kept)) is not None:
            self._verdicts.move_to_end(kept)
            return verdict
        async with self._turn:
            if (verdict := self._verdicts.get(kept)) is None:
                matches = await in_thread(lambda: _matches(password, hashed))
                verdict = matches and name in users
                self._keep(kept, verdict=verdict)
        return verdict

    def _keep(self, digest: bytes, *, verdict: bool) -> None:
        """Those that guess do not drive out the verdicts of those that know."""
        if len(self._verdicts) >= _MOST_KEPT:
            wrong = (each for each, right in self._verdicts.items() if not right)
            oldest = next(wrong, None) or next(iter(self._verdicts))
            del self._verdicts[oldest]
        self._verdicts[digest] = verdict


def _name_and_password(header: bytes | None) -> tuple[str, bytes] | None:
    scheme, _, encoded = (header or b"").partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        name, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        return (name.decode(), password) if colon and len(password) <= _MOST_BYTES else None
    except (binascii.Error, UnicodeDecodeError):
        return None


def _matches(password: bytes, hashed: bytes) -> bool:
    import bcrypt  # noqa: PLC0415  only agents with passwords need it

    try:
        return bcrypt.checkpw(password, hashed)
    except ValueError:  # a NUL in the password
        return False
