"""The books of one agent's sessions, and which sessions are to be followed. Loop-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from coral.client import CollectorInfo
from coral.colony.delivery import Standing
from coral.colony.follow.book import Book, session_of

_MOST_ENDED: Final = 1024

Recall = Callable[[str, str], Standing | None]


class Books:
    """Of the agent AGENT_ID. They outlive its connections and its processes. RECALL says what is
    durable of a session, by agent id and collector id; OPEN are those that had not ended."""

    def __init__(self, agent_id: str, recall: Recall, open_: Iterable[Standing] = ()) -> None:
        self.agent_id = agent_id
        self._recall = recall
        self._open = {it.session.collector_id: Book(it.session, it) for it in open_}
        self._ended: dict[str, Book] = {}  # and perhaps still reported by the agent

    def __iter__(self) -> Iterator[Book]:
        return iter(tuple(self._open.values()))

    def __len__(self) -> int:
        return len(self._open)

    def open(self, info: CollectorInfo) -> Book | None:
        """The book of the session that the agent reports; None for one whose end is known. One that
        was given up for lost, and is at work, goes on."""
        book = self._open.get(info.collector_id) or self._ended.pop(info.collector_id, None)
        if book is None:
            standing = self._recall(self.agent_id, info.collector_id)
            book = Book(standing.session if standing else session_of(self.agent_id, info), standing)
        if book.ended and info.end:
            self._ended[info.collector_id] = book
            return None
        book.ended = None
        book.is_told(info.end.produced if info.end else info.produced)
        self._open[info.collector_id] = book
        return book

    def lost(self, reported: Iterable[str]) -> list[Book]:
        """The books of sessions that an agent which has only those REPORTED does not have any
        more. Call it after `open` of those reported."""
        there = set(reported)
        self._ended = {id_: book for id_, book in self._ended.items() if id_ in there}
        return [book for id_, book in self._open.items() if id_ not in there]

    def close(self, book: Book) -> None:
        """BOOK has ended."""
        self._open.pop(book.session.collector_id, None)
        self._ended[book.session.collector_id] = book
        if len(self._ended) > _MOST_ENDED:  # what is forgotten here the store knows
            del self._ended[next(iter(self._ended))]
