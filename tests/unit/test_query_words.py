"""What `coral query` and `coral colony` say to somebody who types something wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from coral.cli.main import main


def typed(*arguments: str) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(main, list(arguments), prog_name="coral")
    return done.exit_code, done.output


@pytest.mark.parametrize("group", [(), ("query",)])
def test_help_cuts_no_sentence(group: tuple[str, ...]) -> None:
    status, text = typed(*group, "--help")
    commands = text.partition("Commands:")[2]
    assert (status, "..." in commands) == (0, False)
    assert all(len(line) <= 80 for line in commands.splitlines())


def test_a_number_of_rows() -> None:
    for option in (("http", "--top"), ("sql", "SELECT 1", "--rows")):
        for wrong in ("x", "-1", "1.5", "9" * 10):
            status, text = typed("query", *option, wrong)
            assert (status, f"'{option[-1]}': '{wrong}' is not accepted; give a" in text) == (
                2,
                True,
            )


def test_a_wrong_address_is_refused_before_anything_is_opened(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    status, _ = typed("colony", "--data", str(data), "--listen", "x")
    assert (status, data.exists()) == (2, False)
    words = "coral colony: --listen: listen: 'x' is not accepted; give HOST:PORT or unix:PATH"
    assert words in capfd.readouterr().err
