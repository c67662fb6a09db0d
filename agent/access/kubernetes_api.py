"""One POST to the Kubernetes API server, over HTTPS: what `agent.access.kubernetes` asks by.

Blocks, for a bounded time. The agent's own token and the authority's certificates are read for each
question, so both may be rotated.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from coral.agent.config_access import Kubernetes
from coral.agent.errors import UnavailableError
from coral.wire.settings.files import read_regular

_TIMEOUT_S: Final = 3.0
_MOST_ANSWER_BYTES: Final = 1 << 20
_MOST_FILE_BYTES: Final = 1 << 20
_MOST_SAID: Final = 200
_ANSWERED: Final = (200, 201)


class ApiServer:
    """The API server of the configuration."""

    def __init__(self, config: Kubernetes, timeout_s: float = _TIMEOUT_S) -> None:
        parts = urlsplit(config.server)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._config, self._timeout_s = config, timeout_s

    def post(self, path: str, value: Mapping[str, object]) -> Mapping[str, Any]:
        """The object that the server answers VALUE with. Raises `UnavailableError`, which never
        has a token in it."""
        try:
            return self._post(path, value)
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            # ssl.SSLError is an OSError; json and UTF-8 raise ValueErrors.
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnavailableError(
                f"Kubernetes could not be asked at {self._config.server}: {reason}"
            ) from error

    def _post(self, path: str, value: Mapping[str, object]) -> Mapping[str, Any]:
        authority = read_regular(Path(self._config.ca_file), _MOST_FILE_BYTES).decode()
        token = read_regular(Path(self._config.token_file), _MOST_FILE_BYTES).decode().strip()
        if not authority.strip():  # Python would trust the machine's own authorities
            raise ValueError(f"{self._config.ca_file} is empty")
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError(f"{self._config.token_file} holds no token")
        connection = http.client.HTTPSConnection(
            self._host,
            self._port,
            timeout=self._timeout_s,
            context=ssl.create_default_context(cadata=authority),
        )
        try:
            connection.request(
                "POST",
                path,
                json.dumps(value),
                {
                    "Authorization": f"Bearer {token}",
                    "Content-Type": "application/json",
                    "Accept": "application/json",
                },
            )
            response = connection.getresponse()
            body = response.read(_MOST_ANSWER_BYTES + 1)
        finally:
            connection.close()
        if response.status not in _ANSWERED:
            raise ValueError(f"it answered {response.status} {response.reason[:_MOST_SAID]}")
        if len(body) > _MOST_ANSWER_BYTES:
            raise ValueError(f"it answered more than {_MOST_ANSWER_BYTES} bytes")
        answer = json.loads(body)
        if not isinstance(answer, dict):
            raise ValueError("it answered something that is no object")
        return answer
