"""Programs and their hooks: each link is detached by itself, and closing goes to its end."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from coral.bpf import AttachError, BpfError, BpfObject
from coral.bpf.attaching.link import FdLink
from coral.bpf.attaching.tracepoints import raw_tracepoint
from tests.support import compiled

pytestmark = pytest.mark.usefixtures("nothing_left")

PROGRAM = "sessions_enter"
SYS_ENTER = partial(raw_tracepoint, name="sys_enter")


@pytest.fixture(scope="module")
def path() -> Path:
    return compiled("sessions")


@pytest.fixture
def it(path: Path) -> Iterator[BpfObject]:
    options = {"wanted_tgid": os.getpid()}
    with BpfObject(path, programs=(PROGRAM,), options=options) as it:
        it.write_variable("wanted_sessions", 1)
        yield it


def call_getppid(times: int) -> None:
    for _ in range(times):
        os.getppid()


def test_a_link_is_detached_by_itself(it: BpfObject) -> None:
    with it.make_inner("stats") as stats:
        it.install("stats", 0, stats.fd)
        other = it.attach_to(PROGRAM, partial(raw_tracepoint, name="sched_process_exec"))
        first = it.attach_to(PROGRAM, SYS_ENTER)
        call_getppid(10)
        first.detach()
        call_getppid(10)  # not counted
        assert it.attached
        second = it.attach_to(PROGRAM, SYS_ENTER)
        first.detach()
        call_getppid(10)
        assert stats.read()[1]["calls"].sum() == 20
        other.detach()
        second.detach()
        assert not it.attached


def test_what_cannot_be_attached_is_an_error(it: BpfObject) -> None:
    with pytest.raises(AttachError) as refused:
        it.attach_to(PROGRAM, partial(raw_tracepoint, name="coral_no_such"))
    assert refused.value.errno == errno.ENOENT
    assert not it.attached


class _Unwilling:
    """A link that is detached, and says that it was not."""

    def __init__(self, error: Exception, hook: str, program_fd: int) -> None:
        self._link, self._error = raw_tracepoint(program_fd, hook), error

    def detach(self) -> None:
        self._link.detach()
        raise self._error


def test_an_error_on_the_way_does_not_stop_closing(path: Path) -> None:
    errors = [OSError("one"), OSError("two")]
    it = BpfObject(path, programs=(PROGRAM,))
    it.load()
    it.attach()
    for error, hook in zip(errors, ("sched_process_exec", "sched_process_fork"), strict=True):
        it.attach_to(PROGRAM, partial(_Unwilling, error, hook))  # a hook takes a program once
    with pytest.raises(BpfError, match=r"one|two") as raised:
        it.close()
    assert isinstance(raised.value.__cause__, ExceptionGroup)
    assert set(raised.value.__cause__.exceptions) == set(errors)
    assert not it.attached
    assert it.program_stats() == {}  # and the fixture sees that nothing is left
    it.close()


def test_a_variable_that_is_kept_does_not_keep_the_object(it: BpfObject) -> None:
    kept = it.read_variable("wanted_sessions")
    it.write_variable("wanted_sessions", 5)
    it.close()
    assert kept == 1


def test_a_descriptor_is_closed_once() -> None:
    reading, writing = os.pipe()
    link = FdLink(reading)
    link.detach()
    with os.fdopen(os.dup(writing)) as other:  # likely to have the number of the closed one
        link.detach()
        assert os.fstat(other.fileno())
    os.close(writing)
