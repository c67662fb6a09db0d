"""Small files are read without following links, without waiting, and to a limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coral.agent.config import ServiceRule
from coral.agent.errors import NotFoundError
from coral.agent.machine.resolve import resolve
from coral.wire.settings.files import read_regular


def test_a_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 32)
    assert read_regular(tmp_path / "file", 32) == b"x" * 32
    with pytest.raises(OSError, match="more than 31 bytes"):
        read_regular(tmp_path / "file", 31)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "it is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a symbolic link"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_text("1" * 33), "it has more than 32 bytes"),
        (lambda path: path.write_text("12 34"), "'12 34' is not a process id"),
        (lambda path: path.write_text("0"), "'0' is not a process id"),
        (lambda path: path.write_text("-1"), "'-1' is not a process id"),
        (lambda path: path.write_bytes(b"\xc2\xb2"), "is not a process id"),
        (lambda path: path.write_text(""), "'' is not a process id"),
        (lambda _: None, "No such file or directory"),
    ],
    ids=[
        *("fifo", "link", "directory", "long", "two", "zero", "negative", "digit", "empty", "none"),
    ],
)
def test_a_pid_file_is_a_small_regular_file_with_a_process_id(
    make: object, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    make(path)  # type: ignore[operator]
    with pytest.raises(NotFoundError, match=why):
        resolve("shop", {"shop": ServiceRule(pid_file=str(path))})


@pytest.mark.timeout(10)
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/random"])
def test_a_device_is_no_pid_file(device: str) -> None:
    with pytest.raises(NotFoundError, match="it is not a regular file"):
        resolve("shop", {"shop": ServiceRule(pid_file=device)})


def test_a_pid_file_names_its_process(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(f" {os.getpid()}\n")
    rule = ServiceRule(pid_file=str(tmp_path / "pid"))
    assert resolve("shop", {"shop": rule}).tgids == (os.getpid(),)
