"""Unix sockets as the configuration writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from coral.agent.addresses import UnixAddress, unix_address


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("unix:/a", UnixAddress(Path("/a"))),
        ("unix:/a?mode=0600", UnixAddress(Path("/a"))),
        ("unix:/a?mode=0660&group=g", UnixAddress(Path("/a"), 0o660, "g", "view")),
        ("unix:/a?name=ops&mode=660", UnixAddress(Path("/a"), 0o660, "", "ops")),
        ("unix:/a?group=12&mode=0666", UnixAddress(Path("/a"), 0o666, "12", "view")),
    ],
)
def test_a_socket_is_a_path_and_options(text: str, wanted: UnixAddress) -> None:
    assert unix_address(text) == wanted


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("unix:", "'unix:' has no path"),
        ("unix:?mode=0660", "has no path"),
        ("unix:/a?", "an option is missing, or twice; after the [?] give group, mode, name"),
        ("unix:/a?mode=0660&mode=0600", "an option is missing, or twice"),
        ("unix:/a?owner=1", "'owner' is not an option"),
        ("unix:/a?mode=0770", "mode=0770 is not accepted; give 0600, 0660 or 0666"),
        ("unix:/a?mode=rw", "mode=rw is not accepted"),
        ("unix:/a?mode=0060", "mode=0060 is not accepted"),
        ("unix:/a?name=A", "name=A is not accepted"),
    ],
)
def test_what_is_none_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        unix_address(text)


def test_a_group_is_a_name_or_a_number() -> None:
    assert unix_address("unix:/a").gid == -1
    assert unix_address("unix:/a?group=root").gid == 0
    assert unix_address("unix:/a?group=4711").gid == 4711
    with pytest.raises(ValueError, match="no group 'nosuch'"):
        _ = unix_address("unix:/a?group=nosuch").gid
