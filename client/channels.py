"""The channels of one client to its agent. gRPC's channels keep the certificate that they began
with; so when its files change, new calls get a new channel, and the old one lasts as long as its
calls."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc

from coral.client.address import channel_options, is_unix
from coral.client.tls import Tls


class Channels:
    """To ADDRESS, with TLS if it is not a unix socket's. Make it on the running loop."""

    def __init__(self, address: str, tls: Tls | None, read_ahead_bytes: int | None = None) -> None:
        """Raises ValueError for files that cannot be used."""
        self._address = address
        self._options = channel_options(address, read_ahead_bytes)
        self._tls = None if is_unix(address) else tls
        self._seen = self._tls.signature() if self._tls else ()
        self._calls: dict[grpc.aio.Channel, int] = {}
        self._current = self._made()
        self._closing: set[asyncio.Task[None]] = set()

    def current(self) -> grpc.aio.Channel:
        """The channel for a new call. While files are being replaced, that is the old one."""
        if self._tls and (seen := self._tls.signature()) != self._seen:
            with suppress(ValueError):
                before, self._current, self._seen = self._current, self._made(), seen
                self._close_unused(before)
        return self._current

    def hold(self, channel: grpc.aio.Channel, call: Any) -> None:  # noqa: ANN401  of grpc.aio
        """CALL is one of CHANNEL's."""
        self._calls[channel] += 1

        def over(_call: object) -> None:
            self._calls[channel] -= 1
            self._close_unused(channel)

        call.add_done_callback(over)

    async def close(self) -> None:
        """Ends all calls."""
        for channel in tuple(self._calls):
            await channel.close()
        self._calls.clear()

    def _made(self) -> grpc.aio.Channel:
        options: tuple[tuple[str, int | str], ...] = self._options
        if self._tls:
            if self._tls.server_name:
                options = (*options, ("grpc.ssl_target_name_override", self._tls.server_name))
            credentials = self._tls.credentials()
            channel = grpc.aio.secure_channel(self._address, credentials, options=options)
        else:
            channel = grpc.aio.insecure_channel(self._address, options=options)
        self._calls[channel] = 0
        return channel

    def _close_unused(self, channel: grpc.aio.Channel) -> None:
        if channel is not self._current and self._calls.get(channel) == 0:
            del self._calls[channel]
            task = asyncio.ensure_future(channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
