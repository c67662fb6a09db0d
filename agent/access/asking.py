"""The asynchronous shell of decisions that block: each in a thread, for a bounded time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from coral.agent.access.access import Access
from coral.agent.caller import Identity
from coral.agent.errors import LimitError, UnavailableError
from coral.agent.jobs import Jobs

_DEADLINE_S: Final = 6.0

T = TypeVar("T")


class Asking:
    """Waits for what ACCESS decides, and for whom Kubernetes knows."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._jobs = Jobs(_DEADLINE_S)

    async def decided(self, identity: Identity, decide: Callable[[], T]) -> T:
        """What DECIDE returns for a caller; in a thread where it may block. Raises what it raises,
        and `UnavailableError` where that takes too long."""
        if self._access.may_block(identity):
            return await self.in_thread(decide)
        return decide()

    async def in_thread(self, ask: Callable[[], T]) -> T:
        """What ASK returns, in a thread. Raises as `decided` does."""
        try:
            return await self._jobs.run(ask, "authorization")
        except LimitError as error:
            raise UnavailableError(
                "authorization: Kubernetes does not answer in time, so this call is not let in: "
                "try again"
            ) from error
