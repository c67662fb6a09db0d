"""The text of a refusal as gRPC can carry it."""

from __future__ import annotations

import string
from typing import Final
from urllib.parse import quote

# Clients accept 8 KiB of trailing metadata, where a status's text is percent-encoded.
_STATUS_BYTES: Final = 4096
_SENT_AS_IT_IS: Final = string.punctuation.replace("%", "") + " "


def fitting(text: str) -> str:
    """TEXT, without its middle where it is longer than a client accepts: such a client would get a
    transport error in place of the refusal. Lone surrogates, which names from /proc can have, are
    escaped: they cannot be sent."""
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= _STATUS_BYTES and len(quote(text, safe=_SENT_AS_IT_IS)) <= _STATUS_BYTES:
        return text
    plain = text.encode("ascii", "backslashreplace").decode()
    return f"{plain[: _STATUS_BYTES // 4]} [...] {plain[-_STATUS_BYTES // 4 :]}"
