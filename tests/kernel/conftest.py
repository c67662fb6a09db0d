"""Fixtures of tests of connections."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.network import Side, two_sides
from tests.support import Puppet


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Side, Side]]:
    """Two network namespaces with a cable between them."""
    with two_sides() as pair:
        yield pair


@pytest.fixture
def pair(sides: tuple[Side, Side]) -> Iterator[tuple[Puppet, Puppet]]:
    """A client in one namespace, a server in the other."""
    with sides[0].puppet() as client, sides[1].puppet() as server:
        yield client, server
