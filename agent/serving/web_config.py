"""A file in the web configuration format of Prometheus' exporter-toolkit: TLS, passwords, headers.

https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md
What this agent cannot do is refused, and never left out in silence.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct, field

from coral.agent.serving.credentials import CredentialsError, Source, Sources, Verify
from coral.wire.settings.yaml_file import read_yaml

_VERIFY: Final[Mapping[str, Verify]] = {
    "": "none",
    "NoClientCert": "none",
    "VerifyClientCertIfGiven": "request",
    "RequireAndVerifyClientCert": "require",
}
_VERSIONS: Final = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_BCRYPT: Final = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
_MOST_COST: Final = 14  # 3 s of a CPU for a password; htpasswd's own default is 5
_MOST_USERS: Final = 1000
_HEADERS: Final = (
    "Content-Security-Policy",
    "Strict-Transport-Security",
    "X-Content-Type-Options",
    "X-Frame-Options",
    "X-XSS-Protection",
)


class _TlsServer(Struct, forbid_unknown_fields=True, kw_only=True):
    cert_file: str = ""
    cert: str = ""
    key_file: str = ""
    key: str = ""
    client_ca_file: str = ""
    client_ca: str = ""
    client_auth_type: str = ""
    client_allowed_sans: list[str] = []
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    prefer_server_cipher_suites: bool = True


class _HttpServer(Struct, forbid_unknown_fields=True, kw_only=True):
    http2: bool = True
    headers: dict[str, str] = field(default_factory=dict)


class _File(Struct, forbid_unknown_fields=True, kw_only=True):
    tls_server_config: _TlsServer | None = None
    http_server_config: _HttpServer | None = None
    basic_auth_users: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WebConfig:
    """What the file says. `users` are bcrypt hashes by name; `allowed_names` are the subject's
    alternative names, of which a client's certificate must have one; empty: any."""

    tls: Sources | None
    users: Mapping[str, bytes]
    headers: Mapping[str, str]
    allowed_names: frozenset[str]


def read(path: Path) -> WebConfig:
    """The file at PATH; files that it names are relative to it. Raises `CredentialsError`, which
    begins with `metrics_web_config`."""
    try:
        found = msgspec.convert(read_yaml(path), _File)
    except msgspec.ValidationError as error:
        raise _error(path, str(error)) from error
    except ValueError as error:
        raise _error(path, str(error)) from error
    tls = _tls(path, found.tls_server_config) if found.tls_server_config else None
    headers = found.http_server_config.headers if found.http_server_config else {}
    for name, value in headers.items():
        if name not in _HEADERS or not (value.isascii() and value.isprintable()):
            raise _error(path, f"http_server_config.headers: give only {', '.join(_HEADERS)}")
    allowed = found.tls_server_config.client_allowed_sans if found.tls_server_config else []
    return WebConfig(tls, _users(path, found.basic_auth_users), headers, frozenset(allowed))


def _tls(path: Path, found: _TlsServer) -> Sources:
    if found.client_auth_type not in _VERIFY:
        accepted = ", ".join(filter(None, _VERIFY))
        raise _error(
            path,
            f"tls_server_config.client_auth_type: {found.client_auth_type!r} is not accepted; "
            f"give one of {accepted}",
        )
    for name in (found.min_version, found.max_version):
        if name not in _VERSIONS:
            raise _error(path, f"tls_server_config: {name!r} is no version; give TLS12 or TLS13")
    certificate = _source(path, "cert", found.cert_file, found.cert)
    key = _source(path, "key", found.key_file, found.key)
    authorities = _source(path, "client_ca", found.client_ca_file, found.client_ca)
    verify = _VERIFY[found.client_auth_type]
    if not (certificate and key):
        raise _error(path, "tls_server_config: give cert_file and key_file, or cert and key")
    if (verify == "none") == bool(authorities):
        raise _error(
            path, "tls_server_config: give client_ca_file and a client_auth_type that verifies"
        )
    if found.client_allowed_sans and verify != "require":
        raise _error(
            path,
            "tls_server_config.client_allowed_sans: it needs client_auth_type "
            "RequireAndVerifyClientCert",
        )
    least, most = _VERSIONS[found.min_version], _VERSIONS[found.max_version]
    return Sources(certificate, key, authorities, verify, ("http/1.1",), least, most)


def _source(path: Path, name: str, file: str, text: str) -> Source | None:
    if file and text:
        raise _error(path, f"tls_server_config: give {name} or {name}_file, not both")
    key = f"metrics_web_config: {path}: tls_server_config.{name}"
    if file:
        return Source(f"{key}_file", path.parent / file)
    return Source(key, text=text) if text else None


def _users(path: Path, users: Mapping[str, str]) -> Mapping[str, bytes]:
    if len(users) > _MOST_USERS:
        raise _error(path, f"basic_auth_users: there are more than {_MOST_USERS:,}")
    for name, hashed in users.items():
        match: Any = _BCRYPT.fullmatch(hashed)
        if not match or int(match[1]) > _MOST_COST or int(match[1]) < 4:  # noqa: PLR2004  bcrypt's
            raise _error(
                path,
                f"basic_auth_users.{name}: give a hash of bcrypt with a cost of at most "
                f"{_MOST_COST}, such as from `htpasswd -nBC 10 NAME`",
            )
    return {name: hashed.encode() for name, hashed in users.items()}


def _error(path: Path, reason: str) -> CredentialsError:
    return CredentialsError(f"metrics_web_config: {path}: {reason}")
