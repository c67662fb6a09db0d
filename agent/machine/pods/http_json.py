"""JSON over HTTP from Kubernetes' own servers: one answer, or a stream of lines. Blocking; answers
are bounded in size and time."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from coral.agent.machine.pods.source import SourceError
from coral.wire.settings.files import read_regular

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_S: Final = 3.0
_MOST_BYTES: Final = 64 << 20
_MOST_LINE_BYTES: Final = 4 << 20
_MOST_TOKEN_BYTES: Final = 64 << 10
_REASON_BYTES: Final = 300
_GONE: Final = 410


class GoneError(SourceError):
    """The server has forgotten the version that was asked for."""


class Hold:
    """The socket of an answer that goes on, which another thread can end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_over = False

    def take(self, opened: socket.socket | None) -> None:
        """OPENED is the socket from now on; None: there is none."""
        with self._lock:
            self._socket = opened
            if self._is_over:
                self._shut()

    def wait_for(self, idle_s: float) -> None:
        """Reading waits this long at most."""
        with self._lock:
            if self._socket:
                self._socket.settimeout(idle_s)

    def let_go(self) -> None:
        """Ends the answer, and each later one."""
        with self._lock:
            self._is_over = True
            self._shut()

    def _shut(self) -> None:
        if self._socket:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Server:
    """A server at URL. The files of the token and of the certificates that it is checked against
    are read again at each connection, because they are replaced; an empty path is for none. Without
    TLS, whoever has taken the port would get the token: it is not sent then."""

    url: str
    token_file: str = ""
    ca_file: str = ""

    def get(self, path: str) -> Any:  # noqa: ANN401  what the JSON says
        """The answer to one request. Raises `SourceError`."""
        connection = self._request(path, _TIMEOUT_S)
        try:
            response = self._answer(connection)
            body = response.read(_MOST_BYTES + 1)
            if len(body) > _MOST_BYTES:
                raise SourceError(f"{self.url}: the answer has more than {_MOST_BYTES >> 20} MiB")
            return json.loads(body)
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise SourceError(f"{self.url}: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def lines(self, path: str, idle_s: float, hold: Hold) -> Iterator[Any]:
        """Each line of an answer that goes on, until the server ends it, says nothing for IDLE_S,
        or HOLD is let go. Raises `SourceError`, or `GoneError`."""
        connection = self._request(path, _TIMEOUT_S)
        try:
            hold.take(connection.sock)
            response = self._answer(connection)
            hold.wait_for(idle_s)
            while line := response.readline(_MOST_LINE_BYTES + 1):
                if len(line) > _MOST_LINE_BYTES:
                    raise SourceError(f"{self.url}: a line of more than {_MOST_LINE_BYTES} bytes")
                yield json.loads(line)
        except TimeoutError:
            return  # the server has said nothing for long
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise SourceError(f"{self.url}: {error or type(error).__name__}") from error
        finally:
            hold.take(None)
            connection.close()

    def _request(self, path: str, timeout_s: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        headers = {"Accept": "application/json", "User-Agent": "coral"}
        try:
            if self.token_file and parts.scheme == "https":
                token = read_regular(Path(self.token_file), _MOST_TOKEN_BYTES).decode().strip()
                headers["Authorization"] = f"Bearer {token}"
            connection = self._connection(parts.scheme, parts.hostname or "", parts.port, timeout_s)
            connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise SourceError(f"{self.url}: {error}") from error
        return connection

    def _connection(
        self, scheme: str, host: str, port: int | None, timeout_s: float
    ) -> http.client.HTTPConnection:
        if scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=timeout_s)
        context = ssl.create_default_context(cafile=self.ca_file or None)
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)

    def _answer(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        response = connection.getresponse()
        if response.status == http.client.OK:
            return response
        said = response.read(_REASON_BYTES)
        with suppress(ValueError, AttributeError):
            said = str(json.loads(said).get("message", "")).encode()
        text = said.decode(errors="replace").strip()
        message = f"{self.url}: {response.status} {response.reason}{text and f': {text}'}"
        raise (GoneError if response.status == _GONE else SourceError)(message)
