"""Paths as text, found by their hashes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.collectors.http_latency.paths import Paths, path_text
from coral.collectors.http_latency.routes import Routes
from coral.wire.text import is_printable
from tests.summaries import exchanges


def found(paths: Paths, *given_paths: bytes) -> list[tuple[str, str]]:
    """The texts and routes of requests for these paths."""
    numbers, routes = paths.find(exchanges(given_paths))
    return [
        (paths.texts[path], paths.routes[route])
        for path, route in zip(numbers.tolist(), routes.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (b"/a%20b", "/a%20b"),
        ("/größe/\N{SNOWMAN}".encode(), "/größe/\N{SNOWMAN}"),
        (b"/\xff\xfe/x", "/%FF%FE/x"),
        (b"/\xc3", "/%C3"),  # a character that is cut
        (b"/a\x00b\x1b[31m", "/a%00b%1B[31m"),
        ("/a\N{RIGHT-TO-LEFT OVERRIDE}b".encode(), "/a%E2%80%AEb"),
        (b"", ""),
    ],
)
def test_bytes_that_are_no_printable_text_are_escaped(path: bytes, text: str) -> None:
    assert path_text(path) == text


@given(path=st.binary(max_size=300))
def test_any_path_is_printable(path: bytes) -> None:
    assert is_printable(path_text(path))


def test_paths_are_found_again() -> None:
    paths = Paths(Routes())
    first = found(paths, b"/users/7", b"/users/8", b"/users/7", b"/")
    assert first == [
        ("/users/7", "/users/{id}"),
        ("/users/8", "/users/{id}"),
        ("/users/7", "/users/{id}"),
        ("/", "/"),
    ]
    assert found(paths, b"/users/8", b"/x", b"/") == [
        ("/users/8", "/users/{id}"),
        ("/x", "/x"),
        ("/", "/"),
    ]
    assert sorted(paths.texts) == ["/", "/users/7", "/users/8", "/x"]
    assert sorted(paths.routes) == ["/", "/users/{id}", "/x"]


def test_a_path_that_is_cut_is_a_marked_prefix() -> None:
    path = b"/search/" + b"z" * 300
    assert found(Paths(Routes()), path, path + b"/y") == [
        (path[:256].decode() + "…", "/search/{**}"),
        (path[:256].decode() + "…", "/search/{**}"),
    ]
    whole = b"/search/" + b"z" * 248
    assert found(Paths(Routes()), whole) == [(whole.decode(), "/search/{token}")]


def test_a_path_that_had_no_room_says_nothing_of_the_same_path_elsewhere() -> None:
    paths, made = Paths(Routes()), exchanges([b"/users/7", b"/users/7"])
    made["path_bytes"][0] = 0
    numbers, _ = paths.find(made)
    assert [paths.texts[number] for number in numbers.tolist()] == ["", "/users/7"]


def test_a_collapse_applies_to_all_of_the_batch_and_to_what_was_found_before() -> None:
    paths = Paths(Routes(max_children=3))
    assert found(paths, b"/a", b"/b", b"/c") == [("/a", "/a"), ("/b", "/b"), ("/c", "/c")]
    assert {route for _, route in found(paths, b"/a", b"/d", b"/e")} == {"/{*}"}
    assert found(paths, b"/c") == [("/c", "/{*}")]


def test_few_paths_are_kept() -> None:
    paths = Paths(Routes())
    found(paths, *(b"/users/%d" % n for n in range(20_000)))
    assert found(paths, b"/users/7") == [("/users/7", "/users/{id}")]
    assert paths.texts == ["/users/7"]


def test_no_requests_have_no_paths() -> None:
    assert found(Paths(Routes())) == []
