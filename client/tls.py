"""A client's side of TLS: whom it trusts, who it is, and what gRPC's words on failures mean."""

from __future__ import annotations

import os
import socket
import ssl
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import grpc

ENV_CA: Final = "CORAL_TLS_CA"
ENV_CERTIFICATE: Final = "CORAL_TLS_CERT"
ENV_KEY: Final = "CORAL_TLS_KEY"
ENV_SERVER_NAME: Final = "CORAL_TLS_SERVER_NAME"

_MOST_BYTES: Final = 1 << 20
_PROBE_S: Final = 3.0
# What OpenSSL calls the alerts of RFC 8446, 6.2, that are about a client's certificate.
_ALERTS: Final[Mapping[str, str]] = {
    "CERTIFICATE_REQUIRED": "it wants a certificate: give --tls-cert and --tls-key",
    "CERTIFICATE_EXPIRED": "the certificate has expired",
    "UNKNOWN_CA": "no authority that the agent trusts has signed it",
    "BAD_CERTIFICATE": "the certificate is bad",
    "CERTIFICATE_UNKNOWN": "it cannot verify the certificate",
    "UNSUPPORTED_CERTIFICATE": "the certificate is not meant for clients",
    "CERTIFICATE_REVOKED": "the certificate was revoked",
    "DECRYPT_ERROR": "the signature is wrong",
}

Signature = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files: the authorities in CA must have signed the agent's certificate, which must be for
    the host in its address, or for SERVER_NAME. CERTIFICATE and KEY, if given, are the client's.

    The files are looked at before each call; when they have changed, the next call is made on a new
    connection with what they have then."""

    ca: str
    certificate: str = ""
    key: str = ""
    server_name: str = ""

    @classmethod
    def from_environment(cls) -> Self | None:
        """Of CORAL_TLS_CA, CORAL_TLS_CERT, CORAL_TLS_KEY and CORAL_TLS_SERVER_NAME; None where
        none of them is set. Raises ValueError."""
        names = (ENV_CA, ENV_CERTIFICATE, ENV_KEY, ENV_SERVER_NAME)
        values = [os.environ.get(name, "") for name in names]
        return cls(*values).checked() if any(values) else None

    def checked(self) -> Self:
        """This. Raises ValueError where a part is missing."""
        if not self.ca:
            raise ValueError(
                f"--tls-ca, or {ENV_CA}: give the authorities that sign agents' certificates"
            )
        if bool(self.certificate) != bool(self.key):
            raise ValueError(
                f"--tls-cert and --tls-key, or {ENV_CERTIFICATE} and {ENV_KEY}: give both"
            )
        return self

    @property
    def _files(self) -> tuple[tuple[str, str], ...]:
        named = (
            ("--tls-ca", self.ca), ("--tls-cert", self.certificate), ("--tls-key", self.key),
        )  # fmt: skip
        return tuple((name, path) for name, path in named if path)

    def signature(self) -> Signature:
        """What changes when the files do."""
        found = []
        for _, path in self._files:
            stats: tuple[int, ...] = ()
            with suppress(OSError, ValueError):
                stat = Path(path).stat()
                stats = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            found.append(stats)
        return tuple(found)

    def credentials(self) -> grpc.ChannelCredentials:
        """gRPC's, as the files are now. Raises ValueError, with the option and what is wrong."""
        contents: dict[str, bytes] = {}
        for name, path in self._files:
            try:
                with Path(path).open("rb") as file:
                    if name == "--tls-key":
                        _check_mode(os.fstat(file.fileno()).st_mode)
                    contents[name] = file.read(_MOST_BYTES + 1)
                if len(contents[name]) > _MOST_BYTES:
                    raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise ValueError(f"{name}: {path}: {reason}") from error
        self._context()  # gRPC would say of bad files only that it cannot connect
        return grpc.ssl_channel_credentials(
            contents["--tls-ca"], contents.get("--tls-key"), contents.get("--tls-cert")
        )

    def _context(self) -> ssl.SSLContext:
        """Python's. Raises ValueError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"--tls-ca: {self.ca}: no certificate in PEM") from error
        if self.certificate:
            try:
                context.load_cert_chain(self.certificate, self.key, _no_password)
            except (OSError, ssl.SSLError, ValueError) as error:
                reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
                words = str(reason or error).lower().replace("_", " ")
                raise ValueError(
                    f"--tls-cert and --tls-key: {self.certificate}: {words}"
                ) from error
        return context

    def refusal(self, address: str) -> str:
        """The alert by which the agent at ADDRESS refuses this client, in OpenSSL's words, for
        `failure`; empty where there is none. Blocks for up to three seconds. gRPC has the alert in
        its log alone."""
        host, _, port = address.rpartition(":")
        host = host.removeprefix("dns:///").removeprefix("dns:").strip("[]")
        try:
            context = self._context()
            context.set_alpn_protocols(["h2"])
            with (
                socket.create_connection((host, int(port)), _PROBE_S) as plain,
                context.wrap_socket(plain, server_hostname=self.server_name or host) as secure,
            ):
                secure.recv(1)
        except ssl.SSLError as error:
            return next((f"_ALERT_{alert}" for alert in _ALERTS if alert in str(error)), "")
        except (OSError, ValueError):
            return ""
        return ""


def _check_mode(mode: int) -> None:
    """Raises ValueError for the mode of a key that others could read, or choose."""
    if mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            "others than its owner may read or write it "
            f"(mode {stat.S_IMODE(mode):04o}): give a file of mode 0600, or 0640"
        )


def _no_password() -> str:
    raise ValueError("the key is encrypted: give one without a passphrase")


REFUSED: Final = "Unwrap failed (TSI_DATA_CORRUPTED)"
"""How gRPC reports an agent's alert after its part of a handshake of TLS 1.3."""


def failure(details: str, address: str, tls: Tls | None, peer: str = "agent") -> str:
    """What gRPC's DETAILS on a connection to ADDRESS that failed mean, where TLS is what failed;
    else an empty text."""
    if tls is None:
        speaks_tls = "http1.x server" in details
        wants = f"it speaks TLS: give --tls-ca, or {ENV_CA}"
        return f"the {peer} at {address} does not answer: {wants}" if speaks_tls else ""
    reason = ""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        words = details.partition("CERTIFICATE_VERIFY_FAILED:")[2].split(":")[0].strip()
        reason = f"its certificate is not trusted ({words or 'no reason given'}); see --tls-ca"
    elif "Hostname Verification Check failed" in details or "is not in peer certificate" in details:
        name = f" {tls.server_name}" if tls.server_name else ""
        reason = f"its certificate is for another name than{name or ' that'}; see --tls-server-name"
    elif REFUSED in details or "_ALERT_" in details:
        words = next((w for alert, w in _ALERTS.items() if alert in details), "")
        own = "this client's certificate" if tls.certificate else "a client without a certificate"
        reason = f"it does not accept {own}" + (f": {words}" if words else "")
    elif "WRONG_VERSION_NUMBER" in details or "Handshake read failed" in details:
        reason = "it ended the handshake of TLS: does it speak TLS on this address?"
    return f"no connection to {address}: {reason}" if reason else ""
