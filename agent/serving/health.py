"""Health (grpc.health.v1): SERVING from the start of the server until it shuts down."""

from __future__ import annotations

from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

HEALTH_NAME: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Health:
    """The health of the server as a whole (the name "") and of the services in it."""

    def __init__(self, server: grpc.aio.Server, *services: str) -> None:
        self._names = ("", *services)
        self._servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def start_serving(self) -> None:
        """SERVING from now on."""
        for name in self._names:
            await self._servicer.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def shut_down(self) -> None:
        """NOT_SERVING from now on."""
        await self._servicer.enter_graceful_shutdown()
