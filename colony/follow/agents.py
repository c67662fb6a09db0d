"""The agents that are known, by id: their books, and whether somebody follows them. Loop-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from coral.colony.delivery import Delivery, Standing
from coral.colony.follow.books import Books
from coral.colony.follow.sink import Sink

RESTARTED: Final = (
    "the agent was restarted, or was away for so long that it keeps the session no longer"
)


class FollowedTwiceError(Exception):
    """The agent is followed at another address."""


@dataclass(eq=False, slots=True)
class Agent:
    """An agent that has answered, now or in an earlier life of the colony. `address` is where it
    was found last, `heard_ns` when it said something last, both of which may be unknown."""

    agent_id: str
    books: Books
    address: str = ""
    version: str = ""
    kernel: str = ""
    heard_ns: int = 0
    followed: bool = False


class Agents:
    """All of them; SINK says which sessions of theirs are open."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        open_: defaultdict[str, list[Standing]] = defaultdict(list)
        for standing in sink.standings():
            if not standing.ended:
                open_[standing.session.agent_id].append(standing)
        self._known: dict[str, Agent] = {}
        for agent_id, standings in open_.items():
            agent = Agent(agent_id, Books(agent_id, sink.standing, standings))
            agent.heard_ns = max(standing.updated_ns for standing in standings)
            self._known[agent_id] = agent

    def __iter__(self) -> Iterator[Agent]:
        return iter(tuple(self._known.values()))

    def get(self, agent_id: str) -> Agent | None:
        """The agent of that id."""
        return self._known.get(agent_id)

    @contextmanager
    def followed(self, agent_id: str, address: str) -> Iterator[Agent]:
        """The agent, which for the duration of the block is followed at ADDRESS alone. Raises
        `FollowedTwiceError`."""
        agent = self._known.get(agent_id)
        if agent is None:
            agent = self._known[agent_id] = Agent(agent_id, Books(agent_id, self._sink.standing))
        if agent.followed:
            raise FollowedTwiceError(
                f"agent {agent_id} is followed at {agent.address} already: it has two addresses, "
                "or two agents have the same agent_id"
            )
        agent.followed, agent.address = True, address
        try:
            yield agent
        finally:
            agent.followed = False
            if not len(agent.books):  # an address can say that it is another agent each time
                del self._known[agent_id]

    def silent(self, since_ns: int) -> list[Agent]:
        """Those with open books that nobody follows, and that have said nothing since then."""
        return [it for it in self if len(it.books) and not it.followed and it.heard_ns < since_ns]


def given_up(agent: Agent, reported: frozenset[str], why: str, now_ns: int) -> list[Delivery]:
    """Closes the books of AGENT's sessions that are not among those REPORTED; the deliveries that
    end them."""
    deliveries = []
    for book in agent.books.lost(reported):
        deliveries.append(book.close_as_lost(why, now_ns))
        agent.books.close(book)
    return deliveries
