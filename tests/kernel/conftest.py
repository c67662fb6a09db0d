"""Fixtures for tests of connections, and of what is attached."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from build_hook import clang_command
from tests.network import Side, two_sides
from tests.support import ROOT, Puppet, built


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


@pytest.fixture(scope="session")
def attaching_object() -> Path:
    """tests/bpf/attaching.bpf.c, compiled."""
    source = ROOT / "tests/bpf/attaching.bpf.c"
    sources = [source, *(ROOT / "bpf/include").glob("*.h")]
    return built("attaching.bpf.o", sources, partial(clang_command, source))


@pytest.fixture
def no_descriptors_left() -> Iterator[None]:
    """Fails if the test leaves a descriptor open in this process."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) == before
