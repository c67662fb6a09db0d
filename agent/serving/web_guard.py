"""Who may read the metrics, by a web configuration file that is read again when it changes."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from coral.agent.config import Config, ConfigError
from coral.agent.serving import web_config
from coral.agent.serving.credentials import Credentials, CredentialsError, load
from coral.agent.serving.http import Headers, Page
from coral.agent.serving.passwords import Passwords
from coral.agent.serving.rotation import Watched
from coral.agent.serving.web_config import WebConfig

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.tls")

_SAN_KINDS: Final = ("DNS", "URI", "IP Address", "email")


class _Read(NamedTuple):
    config: WebConfig
    credentials: Credentials | None


class WebGuard(Watched[_Read]):
    """As `http.Guard` has it, by the file at PATH."""

    def __init__(self, path: Path) -> None:
        """Raises `CredentialsError`."""
        super().__init__("metrics")
        self._path = path
        self._passwords: Passwords | None = None
        self._read: _Read | None = None
        self.is_due()
        self._read = self.read()
        self.is_due()  # now that it is known which files it names
        self._count()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        named = self._read.config.tls.paths if self._read and self._read.config.tls else ()
        return (self._path, *named)

    def read(self) -> _Read:
        """Reads and checks them. Raises `CredentialsError`."""
        config = web_config.read(self._path)
        return _Read(config, load(config.tls) if config.tls else None)

    def use(self, read: _Read) -> None:
        """Connections and requests are judged by what was READ."""
        self._read = read
        self._count()
        serial = read.credentials.serial if read.credentials else None
        log.info(
            "files of TLS were read again", listener=self.listener, serial=serial,
            users=len(read.config.users),
        )  # fmt: skip

    def _count(self) -> None:
        credentials = self._now.credentials
        self.counts.expiries_s = dict(credentials.expiries_s) if credentials else {}

    @property
    def _now(self) -> _Read:
        assert self._read  # noqa: S101  by __init__
        return self._read

    @property
    def refuses(self) -> bool:
        """Whether not everybody gets the pages."""
        config = self._now.config
        verifies = config.tls is not None and config.tls.client_certificates == "require"
        return bool(config.users) or verifies

    @property
    def context(self) -> ssl.SSLContext | None:
        """What new connections are encrypted with."""
        credentials = self._now.credentials
        return credentials.context if credentials else None

    @property
    def headers(self) -> Mapping[str, str]:
        """What every answer has, too."""
        return self._now.config.headers

    async def refusal(self, headers: Headers, certificate: Mapping[str, Any]) -> Page | None:
        """403 to a certificate of another name, 401 without one of the passwords."""
        config = self._now.config
        if config.allowed_names and not config.allowed_names & _alternatives(certificate):
            return Page(b"The certificate has none of the names that are allowed.\n", 403)
        if not config.users:
            return None
        if self._passwords is None:
            self._passwords = Passwords()
        if await self._passwords.accept(headers.get(b"authorization"), config.users):
            return None
        return Page(b"Unauthorized\n", 401, {"WWW-Authenticate": "Basic"})


def _alternatives(certificate: Mapping[str, Any]) -> frozenset[str]:
    found = certificate.get("subjectAltName", ())
    return frozenset(value for kind, value in found if kind in _SAN_KINDS)


def read_guard(config: Config) -> WebGuard | None:
    """What CONFIG names, if it does. Raises `ConfigError`."""
    if not config.metrics_web_config:
        return None
    try:
        return WebGuard(Path(config.metrics_web_config))
    except CredentialsError as error:
        raise ConfigError(str(error)) from error
