"""Routes of paths: by hand-written table, by patterns, and for any path."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coral.collectors.http_latency.collector import HttpLatencyCollector
from coral.collectors.http_latency.routes import Routes, pattern
from coral.collectors.options import OptionError

SHA1 = "9f1c2d3e4a5b6c7d8e9f0a1b2c3d4e5f60718293"


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/", "/"),
        ("", ""),
        ("*", "*"),
        ("*/x", "{*}"),
        ("/health", "/health"),
        ("/users/42", "/users/{id}"),
        ("/users/42/", "/users/{id}/"),
        ("//users//42", "//users//{id}"),
        ("/users/42/orders/007", "/users/{id}/orders/{id}"),
        ("/users/4a", "/users/4a"),
        ("/v1/users", "/v1/users"),
        ("/users/-42", "/users/-42"),
        ("/users/٤٢", "/users/٤٢"),  # digits, but no number that a program would parse
        ("/o/123e4567-e89b-12d3-a456-426614174000", "/o/{uuid}"),
        ("/o/123E4567-E89B-12D3-A456-426614174000", "/o/{uuid}"),
        ("/o/123e4567-e89b-12d3-a456-42661417400", "/o/{token}"),
        (f"/commit/{SHA1}", "/commit/{hash}"),
        ("/commit/deadbeefdeadbeef", "/commit/{hash}"),
        ("/commit/deadbeefdeadbee", "/commit/deadbeefdeadbee"),
        ("/commit/1234567890123456", "/commit/{id}"),
        ("/log/2024-01-31", "/log/{date}"),
        ("/log/2024-01", "/log/2024-01"),
        ("/s/eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln", "/s/{token}"),
        ("/s/01ARZ3NDEKTSV4RRFFQ69G5FAV", "/s/{token}"),
        ("/s/A1b2C3d4E5f6G7h8J9k", "/s/A1b2C3d4E5f6G7h8J9k"),  # 19 characters
        ("/s/abcdefghijklmnopqrstuvwxyz", "/s/abcdefghijklmnopqrstuvwxyz"),
        ("/docs/oauth2-authorization-server", "/docs/oauth2-authorization-server"),
        ("/docs/how-to-configure-a-proxy", "/docs/how-to-configure-a-proxy"),
        ("/" + "z" * 64, "/" + "z" * 64),
        ("/" + "z" * 65, "/{token}"),
        ("/" + "/".join("a" * 21), "/" + "/".join("a" * 20) + "/{**}"),
        ("/search/cats-and-do…", "/search/{**}"),
        ("/users/4…", "/users/{**}"),
        ("/users/{id}/orders/{uuid}", "/users/{id}/orders/{uuid}"),
        ("/users/{name}", "/users/{name}"),
    ],
)
def test_segments_that_look_like_identifiers_become_their_kind(path: str, route: str) -> None:
    assert Routes().route_of(path) == route


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/users/alice", "/users/{name}"),
        ("/users/42", "/users/{name}"),
        ("/users/me", "/users/me"),
        ("/users/", "/users/"),  # a parameter is not empty
        ("/users/alice/orders", "/users/alice/orders"),
        ("/users/alice/orders/x-1", "/users/*/orders/{order}"),
        ("/static", "/static/**"),
        ("/static/", "/static/**"),
        ("/static/css/42/a.css", "/static/**"),
        ("/statics", "/statics"),
        ("/a.b/1", "/a.b/{id}"),
        ("/aXb/1", "/aXb/{id}"),
        ("/static/very-lon…", "/static/**"),
        ("/users/very-lon…", "/users/{**}"),  # there may be more segments
    ],
)
def test_patterns_come_first_in_their_order(path: str, route: str) -> None:
    patterns = ("/users/me", "/users/{name}", "/users/*/orders/{order}", "/static/**", "/a.b/{id}")
    assert Routes(patterns).route_of(path) == route


@pytest.mark.parametrize("text", ["/", "/**", "/*", "/a/{id}/b", "/a.b/c-d/{x}/**", "/%7Euser/"])
def test_a_pattern_is_its_own_route(text: str) -> None:
    assert Routes((pattern(text),)).route_of(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "users", "users/{id}", "/a/**/b", "/a{id}", "/{id", "/{a{b}}", "/a*", "/a?b=1", "/a b"],
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="patterns of paths"):
        pattern(text)


def test_the_option_routes_says_what_it_accepts() -> None:
    HttpLatencyCollector.check({"scope": "host", "routes": "/users/{id}, /static/**"}, None)
    with pytest.raises(
        OptionError, match=r'config\["routes"\]: \'users\' is not accepted; give pa'
    ):
        HttpLatencyCollector.check({"scope": "host", "routes": "users"}, None)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("min_duration", "1s"),
        *(
            (flag, "true")
            for flag in ("errors_only", "include_query", "include_host", "traceparent")
        ),
    ],
)
def test_options_of_single_events_are_refused_for_summaries(option: str, value: str) -> None:
    config = {"scope": "host", option: value}
    HttpLatencyCollector.check({**config, "mode": "events"}, None)
    with pytest.raises(OptionError, match="it with mode=events only"):
        HttpLatencyCollector.check(config, None)


def test_a_place_with_too_many_segments_collapses_for_good() -> None:
    routes = Routes(max_children=3)
    names = ("ann", "bob", "cyd")
    assert [routes.route_of(f"/users/{name}/x") for name in names] == [
        f"/users/{name}/x" for name in names
    ]
    assert routes.route_of("/users/7/x") == "/users/{id}/x"  # no name for a place to be full of
    assert routes.collapses == 0
    assert routes.route_of("/users/dan/x") == "/users/{*}/x"
    assert routes.collapses == 1
    assert routes.route_of("/users/ann/x") == "/users/{*}/x"
    assert routes.route_of("/users/7/x") == "/users/{id}/x"
    assert routes.route_of("/shops/ann/x") == "/shops/ann/x"


def test_a_hundred_segments_at_one_place_are_kept_apart() -> None:
    routes, names = Routes(), [f"/users/user{n}x" for n in range(101)]
    assert [routes.route_of(name) for name in names[:100]] == names[:100]
    assert routes.route_of(names[100]) == "/users/{*}"
    assert {routes.route_of(name) for name in names} == {"/users/{*}"}


def test_scans_leave_a_bounded_number_of_routes() -> None:
    routes, found = Routes(), set()
    for top in range(120):
        for below in range(120):
            found.add(routes.route_of(f"/top{top}x/below{below}x/leaf{below}x"))
    after = {
        routes.route_of(f"/top{top}x/below{below}x/leaf{below}x")
        for top in range(120)
        for below in range(120)
    }
    assert after == {"/{*}/{*}/{*}"}
    assert len(found) < 20_000


def test_a_tree_that_is_full_ends_routes_early() -> None:
    routes = Routes(max_children=20_000)
    for n in range(10_000):
        assert routes.route_of(f"/user{n}x") == f"/user{n}x"
    assert routes.route_of("/user7x") == "/user7x"
    assert routes.route_of("/one/more") == "/{**}"
    assert routes.route_of("/user7x/more") == "/user7x/{**}"


segments = st.one_of(
    st.sampled_from(["", "users", "42", "{id}", "{*}", "{**}", "2024-01-31", SHA1, "a1" * 12, "…"]),
    st.text(st.characters(exclude_characters="/?"), max_size=6),
)
paths = st.one_of(
    st.text(max_size=300),
    st.builds(lambda parts: "/" + "/".join(parts), st.lists(segments, max_size=24)),
)
patterns = st.lists(
    st.sampled_from(["/**", "/{x}", "/users/*", "/users/{id}/**", "/*/{b}", "/users"]),
    max_size=3,
    unique=True,
)


@settings(max_examples=200)
@given(given_paths=st.lists(paths, max_size=30), patterns=patterns, children=st.integers(1, 4))
def test_routes_are_deterministic_idempotent_and_bounded(
    given_paths: list[str], patterns: list[str], children: int
) -> None:
    routes, again = Routes(patterns, children), Routes(patterns, children)
    for path in given_paths:
        route = routes.route_of(path)
        assert again.route_of(path) == route
        assert routes.route_of(route) == again.route_of(route) == route
        assert route.count("/") <= 21
    settled = {routes.route_of(path) for path in given_paths}
    if not routes.collapses:
        assert settled == {again.route_of(path) for path in given_paths}
    # At each place so many segments, and one for each kind of identifier.
    firsts = {route.split("/")[1] for route in settled if "/" in route} - set(patterns)
    kinds = {"{id}", "{uuid}", "{hash}", "{date}", "{token}", "{*}", "{**}"}
    named = {first for first in firsts - kinds if not any(first in it for it in patterns)}
    assert len(named) <= children
