"""The receiver of the configuration, and what the files that it names have for it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from coral.agent.config import ConfigError
from coral.agent.config_otlp import Otlp
from coral.collectors.runner import in_thread
from coral.wire.otlp.transport import Grpc, Http, Transport
from coral.wire.posting import Headers, headers_of
from coral.wire.settings.files import read_regular

_MOST_FILE_BYTES: Final = 1 << 20


def transport(config: Otlp) -> Transport:
    """The transport that CONFIG asks for. Raises `ConfigError`."""
    headers = read_headers(config)
    ca = _read("otlp.ca_file", config.ca_file) if config.ca_file else None
    if config.protocol == "grpc":
        return Grpc(config.endpoint, headers, ca)
    try:
        return Http(config.endpoint, headers, ca, in_thread)
    except ValueError as error:
        raise ConfigError(f"otlp.ca_file: {config.ca_file}: {error}") from error


def read_headers(config: Otlp) -> Headers:
    """The headers of `otlp.headers_file`, names in lower case. Raises `ConfigError`."""
    path = config.headers_file
    if not path:
        return ()
    text = _read("otlp.headers_file", path).decode(errors="replace")
    try:
        return headers_of(text)
    except ValueError as error:
        raise ConfigError(f"otlp.headers_file: {path}: {error}") from error


def _read(key: str, path: str) -> bytes:
    try:
        return read_regular(Path(path), _MOST_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from error
