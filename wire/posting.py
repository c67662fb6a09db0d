"""Requests with a body in protobuf to an HTTP receiver of metrics or spans. Blocks: call it in a
thread."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Final

Headers = Sequence[tuple[str, str]]

_MOST_ANSWER_BYTES: Final = 64 << 10
# After these a receiver may accept the same later; others are final (OTLP specification, "OTLP/HTTP
# Response").
_PASSING_STATUSES: Final = frozenset({429, 502, 503, 504})


class NotAcceptedError(Exception):
    """The receiver did not accept a request: CODE and the message say why; PASSING, that it may
    accept the same later."""

    def __init__(self, code: str, reason: str, *, passing: bool) -> None:
        super().__init__(reason)
        self.code, self.passing = code, passing


class Poster:
    """Posts to URLs below ENDPOINT, with HEADERS; over TLS the receiver is one of the authorities
    CA, in PEM, or of this machine. Raises ValueError where CA is not PEM."""

    def __init__(self, endpoint: str, headers: Headers, ca: bytes | None) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._headers = dict(headers)
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects(), urllib.request.ProxyHandler()]
        if endpoint.startswith("https"):
            try:
                context = ssl.create_default_context(cadata=ca.decode() if ca else None)
            except ssl.SSLError as error:
                raise ValueError("not PEM") from error
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def post(
        self,
        path: str,
        body: bytes,
        timeout_s: float,
        more: Mapping[str, str] | None = None,
        passing: frozenset[int] = _PASSING_STATUSES,
    ) -> bytes:
        """What the receiver answers to BODY at PATH, sent with MORE headers; after a status among
        PASSING it may accept the same later. Raises `NotAcceptedError`."""
        headers = {**self._headers, "Content-Type": "application/x-protobuf", **(more or {})}
        request = urllib.request.Request(  # noqa: S310  the scheme was checked
            self._endpoint + path, body, headers
        )
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                answer: bytes = response.read(_MOST_ANSWER_BYTES)
                return answer
        except urllib.error.HTTPError as error:
            may_pass = error.code in passing
            raise NotAcceptedError(str(error.code), str(error.reason), passing=may_pass) from error
        except urllib.error.URLError as error:
            raise NotAcceptedError("UNREACHABLE", str(error.reason), passing=True) from error
        except (OSError, HTTPException) as error:
            raise NotAcceptedError("UNREACHABLE", str(error), passing=True) from error


def headers_of(text: str) -> Headers:
    """The headers of a file with a `NAME: VALUE` a line, names in lower case. Raises ValueError."""
    headers = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, value = (part.strip() for part in line.partition(":"))
        word = name.replace("-", "").replace("_", "")
        if not (word.isalnum() and value and (name + value).isascii() and value.isprintable()):
            raise ValueError(f"line {number} is not accepted; give lines of NAME: VALUE, in ASCII")
        headers.append((name.lower(), value))
    return headers


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The specifications know no redirects, and they would carry the headers elsewhere."""

    def redirect_request(self, *_: object) -> None:
        return None
