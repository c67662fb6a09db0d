"""gRPC's own socket, which only the gate can reach."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import grpc

from coral.agent.config import ConfigError


class Upstream:
    """The socket that SERVER listens on, behind the gate.

    gRPC can only bind a path. It is made in a directory that only this user can enter, and removed
    once it is bound: from then on the descriptor that this object keeps is the only way to it, and
    nothing is left behind by an agent that is killed.
    """

    def __init__(self, server: grpc.aio.Server, directory: Path | None) -> None:
        """DIRECTORY, if any, is one that this user may write, for machines where there is no other.
        Raises `ConfigError`."""
        try:
            with _private_directory(directory) as private:
                path = Path(private, "grpc")
                server.add_insecure_port(f"unix:{path}")
                self._descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
                path.unlink()
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"no socket for gRPC could be made: {error}") from error

    def dial(self) -> socket.socket:
        """A connection to it, which does not block and has a name of its own. Raises OSError."""
        dialled = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            dialled.setblocking(False)
            dialled.bind("")  # the kernel chooses a free name, unix(7): "Autobind"
            dialled.connect(f"/proc/self/fd/{self._descriptor}")
        except OSError:
            dialled.close()
            raise
        return dialled

    def close(self) -> None:
        """Lets go of the socket, which gRPC closes."""
        os.close(self._descriptor)


def peer_of(dialled: socket.socket) -> str:
    """The name that gRPC has for the other end of a connection that was DIALLED."""
    name: bytes = dialled.getsockname()
    return f"unix-abstract:{name[1:].decode()}"


def _private_directory(fallback: Path | None) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="coral-")
    except OSError:
        if fallback is None:
            raise
        return tempfile.TemporaryDirectory(prefix=".coral-", dir=fallback)
