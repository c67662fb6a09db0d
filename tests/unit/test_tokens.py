"""Tokens in files: whose each is, and how they change in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog

from coral.agent.access.tokens import Tokens
from coral.agent.config import ConfigError
from coral.agent.config_access import Auth, TokenFile


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def written(path: Path, token: str, mode: int = 0o600) -> str:
    """PATH, with that content; a new file takes its place, as Kubernetes does it."""
    fresh = path.with_name("fresh")
    fresh.write_text(token)
    fresh.chmod(mode)
    fresh.rename(path)
    return str(path)


def auth(directory: Path) -> Auth:
    return Auth(
        token_file=written(directory / "default", "d" * 16),
        tokens=(
            TokenFile(name="ci", file=written(directory / "ci", "c" * 16 + "\n")),
            TokenFile(name="team", file=written(directory / "team", "t" * 32)),
        ),
    )


def test_each_token_has_the_name_that_its_file_was_given(tmp_path: Path) -> None:
    tokens = Tokens(auth(tmp_path))
    assert tokens
    assert [tokens.name_of(t) for t in ("d" * 16, "c" * 16, "t" * 32, "x" * 16, "")] == [
        "default", "ci", "team", "", "",
    ]  # fmt: skip
    assert not Tokens(Auth())


def test_a_file_that_changes_is_read_again_within_a_second(tmp_path: Path) -> None:
    clock = Clock()
    tokens = Tokens(auth(tmp_path), clock)
    written(tmp_path / "ci", "n" * 16)
    assert tokens.name_of("c" * 16) == "ci"
    clock.now_s = 1.0
    assert (tokens.name_of("c" * 16), tokens.name_of("n" * 16)) == ("", "ci")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: written(path, "short"), "has 5 bytes"),
        (lambda path: written(path, ""), "is empty"),
        (lambda path: written(path, "n" * 16, 0o666), "others than its owner may write it"),
    ],
)
def test_a_file_that_holds_no_good_token_any_more_leaves_the_last_one(
    change: object, reason: str, tmp_path: Path
) -> None:
    assert callable(change)
    clock = Clock()
    tokens = Tokens(auth(tmp_path), clock)
    change(tmp_path / "ci")
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            clock.now_s += 1.0
            assert tokens.name_of("c" * 16) == "ci"
    (line,) = lines
    assert line["event"] == "the last token stays in force"
    assert reason in line["reason"]
    assert "auth.tokens[0].file" in line["reason"]
    written(tmp_path / "ci", "n" * 16)
    clock.now_s += 1.0
    assert tokens.name_of("n" * 16) == "ci"


def test_a_token_file_is_checked_at_the_start_and_named(tmp_path: Path) -> None:
    bad = Auth(tokens=(TokenFile(name="ci", file=written(tmp_path / "ci", "short")),))
    with pytest.raises(ConfigError, match=r"auth.tokens\[0\].file: .*/ci: the token has 5 bytes"):
        Tokens(bad)
