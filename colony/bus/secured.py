"""A client of NATS that reads its certificates and secrets again at each connection, and never
sends secrets over a connection that was to be encrypted and is not."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import nkeys
from nats.aio.client import Client
from nats.errors import Error as NatsError

from coral.colony.bus.settings import SECRETS, BusSettings
from coral.wire.settings.files import read_regular

_MOST_BYTES: Final = 1 << 20
_TLS: Final = "tls"
_JWT: Final = "NATS USER JWT"
_SEED: Final = "USER NKEY SEED"
_REASONS: Final = {
    "KEY_VALUES_MISMATCH": "it is not the key of the certificate",
    "NO_START_LINE": "it is not PEM",
}


class SecretsError(NatsError):
    """A file cannot be used, or a connection is not what the configuration wants; the message
    begins with the key of the configuration."""


class SecuredClient(Client):
    """A client with SETTINGS. Two of nats-py's own methods, which it calls once for each
    connection, look at the files; callables of its options would not be told of all of them."""

    def __init__(self, settings: BusSettings) -> None:
        super().__init__()
        self._settings = settings

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """For the next connection. Raises `SecretsError`."""
        return context_of(self._settings)

    def _connect_command(self) -> bytes:
        """The first words to the server. Raises `SecretsError`."""
        server, settings = self._current_server, self._settings
        if server and server.uri.scheme == _TLS and not self._server_info.get("tls_required"):
            raise SecretsError(
                "bus.servers: it does not speak TLS, and tls:// wants it: write nats:// to connect "
                "without"
            )
        if settings.user:
            self.options["user"] = settings.user
            self.options["password"] = _text("password_file", settings.password_file)
        if settings.token_file:
            self.options["token"] = _text("token_file", settings.token_file)
        if settings.nkey_file:
            pair = _pair("nkey_file", settings.nkey_file, _text("nkey_file", settings.nkey_file))
            self._public_nkey = pair.public_key.decode()
            self._signature_cb = _signing(pair)
        if path := settings.credentials_file:
            text = _text("credentials_file", path)
            self._user_jwt_cb = _part(path, text, _JWT).encode
            self._signature_cb = _signing(_pair("credentials_file", path, _part(path, text, _SEED)))
        self._auth_configured = True
        return super()._connect_command()


def check(settings: BusSettings) -> None:
    """Reads all files once. Raises `SecretsError`."""
    context_of(settings)
    for key in ("password_file", "token_file", "nkey_file", "credentials_file"):
        path = getattr(settings, key)
        text = _text(key, path) if path else ""
        if path and key == "nkey_file":
            _pair(key, path, text)
        if path and key == "credentials_file":
            _part(path, text, _JWT)
            _pair(key, path, _part(path, text, _SEED))


def context_of(settings: BusSettings) -> ssl.SSLContext:
    """TLS as the files are now. Raises `SecretsError`."""
    context = ssl.create_default_context()
    if settings.ca_file:
        pem = _text("ca_file", settings.ca_file, secret=False)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=pem)
        except (ssl.SSLError, ValueError) as error:
            raise SecretsError(f"bus.ca_file: {settings.ca_file}: no certificate in PEM") from error
    if settings.certificate_file:
        _text("key_file", settings.key_file)
        try:
            context.load_cert_chain(settings.certificate_file, settings.key_file, _no_password)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None)
            why = _REASONS.get(reason or "", getattr(error, "strerror", None) or str(error))
            raise SecretsError(
                f"bus.certificate_file and bus.key_file: {settings.certificate_file}: {why}"
            ) from error
    return context


def words_of(error: BaseException, settings: BusSettings) -> str:
    """What ERROR of a connection means to those who configured it."""
    text = str(error) or type(error).__name__
    if words := _tls_words(error, text):
        return words
    if "Authorization Violation" in text:
        given = [f"bus.{key}" for key in SECRETS if getattr(settings, key)]
        if not given:
            return f"it wants a user: give one of {', '.join(f'bus.{key}' for key in SECRETS)}"
        return f"it does not accept the user of {', '.join(given)}"
    if "Expired" in text or "Revoked" in text:
        return f"the user of bus.credentials_file is not accepted any more: {text}"
    return text


def _tls_words(error: BaseException, text: str) -> str:
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); see bus.ca_file"
    if "CERTIFICATE_REQUIRED" in reason or "client certificate" in text:
        return "it wants a certificate: give bus.certificate_file and bus.key_file"
    if "ALERT" in reason:
        alert = reason.rpartition("ALERT_")[2].lower().replace("_", " ")
        return f"it does not accept the certificate of bus.certificate_file: {alert}"
    return ""


def _text(key: str, path: str, *, secret: bool = True) -> str:
    try:
        text = read_regular(Path(path), _MOST_BYTES, secret=secret).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise SecretsError(f"bus.{key}: {path}: it is not ASCII") from error
    except OSError as error:
        raise SecretsError(f"bus.{key}: {path}: {error.strerror}") from error
    if not text:
        raise SecretsError(f"bus.{key}: {path}: it is empty")
    return text


def _part(path: str, text: str, name: str) -> str:
    """The line between the marks of NAME."""
    lines = iter(text.splitlines())
    for line in lines:
        if f"BEGIN {name}" in line:
            return next(lines, "").strip()
    raise SecretsError(f"bus.credentials_file: {path}: it has no {name}, as `nsc` writes it")


def _pair(key: str, path: str, seed: str) -> nkeys.KeyPair:
    try:
        return nkeys.from_seed(bytearray(seed.encode()))
    except Exception as error:  # whatever a library raises for bytes that are no seed
        raise SecretsError(f"bus.{key}: {path}: it has no seed of an nkey, SU…") from error


def _signing(pair: nkeys.KeyPair) -> Callable[[str], bytes]:
    return lambda nonce: base64.b64encode(pair.sign(nonce.encode()))


def _no_password() -> NoReturn:
    raise ValueError("the key is encrypted: give one without a passphrase")
