"""A subscription: a collector's batches, each event once, over as many connections as it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import grpc

from coral.client.account import Account, Ledger
from coral.client.backoff import Retry
from coral.client.batch import Batch
from coral.client.calls import Call, RepeatedCall
from coral.client.errors import (
    AgentError,
    ContractError,
    InvalidArgumentError,
    NotFoundError,
    StreamLostError,
    UnavailableError,
)
from coral.mesh.v1 import ebpf_pb2 as pb


class Stream:
    """Iterate over it to get batches; the iteration ends after the one that carries the session's
    end. About once a second a batch without rows says where the stream stands.

    A read may be cancelled (`asyncio.timeout`); the next one goes on where it left off. So does
    the next one after an `UnavailableError`; after any other error the iteration is over.
    """

    def __init__(
        self,
        wanted: pb.EbpfEventStreamRequest,
        make: Callable[[pb.EbpfEventStreamRequest], Call],
        error: Callable[[grpc.StatusCode, str], AgentError],
        retry: Retry,
        timeout_s: float,
    ) -> None:
        self._wanted = wanted
        self._make = make
        self._ledger = Ledger(wanted.after_seq)
        self._calls = RepeatedCall(self._resume, error, retry, timeout_s)
        self._over = False
        self.received_bytes = 0  # of batches, as they are on the wire

    @property
    def account(self) -> Account:
        """Where the session's events are: delivered, filtered, lost, as of the last batch."""
        return self._ledger.account

    @property
    def reconnects(self) -> int:
        """How often the stream was resumed on a new connection."""
        return max(self._calls.stood - 1, 0)

    async def open(self) -> None:
        """Returns when the subscription stands. Raises `AgentError`."""
        await self._calls.open()

    def close(self) -> None:
        """Leaves the session. Safe to call twice."""
        self._over = True
        self._calls.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        """Raises `StreamLostError` where an agent answers that does not have the stream,
        `UnavailableError` where none answers, `LimitExceededError` where the agent gives up a slow
        reader, `ContractError` where what it sends does not add up."""
        while not self._over:
            try:
                batch = await self._read()
                is_new = self._ledger.take(batch)
            except UnavailableError:
                raise
            except AgentError:
                self.close()
                raise
            if is_new:
                if batch.message.HasField("end"):
                    self.close()
                return batch
        raise StopAsyncIteration

    async def _read(self) -> Batch:
        try:
            wire = await self._calls.read()
        except (NotFoundError, InvalidArgumentError) as error:
            raise StreamLostError(
                f"the stream of {self._wanted.collector_id} cannot be resumed after event number "
                f"{self._ledger.last_seq}: the agent was restarted, or keeps this session no "
                f"longer: {error}",
                self.account,
            ) from error
        if wire is None:
            raise ContractError("the stream ended, and its last batch did not say why")
        self.received_bytes += len(wire)
        return Batch.parse(wire)

    def _resume(self) -> Call:
        self._wanted.after_seq = self._ledger.begin_call()
        return self._make(self._wanted)
