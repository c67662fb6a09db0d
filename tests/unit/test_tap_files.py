"""`coral tap -o FILE`: which files are accepted, and that each is written whole or not at all."""

from __future__ import annotations

import gc
import os
import stat
from pathlib import Path

import click
import pytest

from coral.cli.tap.files import Output, parse_output
from coral.views.contract import Session
from coral.views.cpu_profile import VIEW
from coral.views.cpu_profile.story import ProfileStory
from coral.views.registry import VIEWS
from tests.profiles import Stack, batch_of

OTHERS = [view for view in VIEWS.values() if not view.files]
SESSION = Session("shop", "stopped")


def refusal(text: str) -> str:
    with pytest.raises(click.UsageError) as refused:
        parse_output(text, VIEW, VIEWS)
    return refused.value.message


def story() -> ProfileStory:
    filled = ProfileStory()
    filled.add(batch_of(Stack(["main", "work"], 7)))
    return filled


@pytest.mark.parametrize("form", ["table", "json", "yaml"])
def test_forms_of_standard_output_are_what_they_were(form: str) -> None:
    for view in VIEWS.values():
        assert parse_output(form, view, VIEWS) == Output(form)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("flame.html", ".html"),
        ("flame.SVG", ".svg"),
        ("a.b.folded", ".folded"),
        ("cpu.pb.gz", ".pb.gz"),
        ("cpu.speedscope.json", ".speedscope.json"),
        ("json.html", ".html"),
    ],
)
def test_the_suffix_chooses_the_format(name: str, suffix: str, tmp_path: Path) -> None:
    output = parse_output(str(tmp_path / name), VIEW, VIEWS)
    assert (output.form, output.path) == ("table", tmp_path / name)
    assert output.format
    assert output.format.suffix == suffix


@pytest.mark.parametrize("name", ["flame.txt", "flame", "xml", "cpu.json", "cpu.gz", ".html", ""])
def test_an_unknown_suffix_is_refused_with_those_that_are_accepted(name: str) -> None:
    assert refusal(name) == (
        f"-o {name}: give table, json or yaml, or a file whose name ends with .html, .svg, "
        ".folded, .pb.gz or .speedscope.json"
    )


def test_a_path_that_cannot_be_written_to_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    (tmp_path / "folder.html").mkdir()
    folder, missing = tmp_path / "folder.html", tmp_path / "no" / "flame.html"
    assert refusal(str(folder)) == f"-o {folder}: this is a directory"
    assert refusal(str(missing)) == f"-o {missing}: there is no directory {tmp_path}/no"


def test_what_is_no_regular_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe.html", tmp_path / "null.svg"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link):
        assert refusal(str(path)) == f"-o {path}: this is not a regular file"


def test_a_name_that_no_file_can_have_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 300}.html"
    assert refusal(str(path)) == f"-o {path}: File name too long"


def test_garbage_is_collected_again_after_a_file_whatever_happened(tmp_path: Path) -> None:
    output = parse_output(str(tmp_path / "cpu.folded"), VIEW, VIEWS)
    output.write(story(), SESSION)
    assert gc.isenabled()
    with pytest.raises(TypeError):
        output.write(next(iter(OTHERS)).story(frozenset()), SESSION)
    assert gc.isenabled()


def test_kinds_without_files_say_which_have_some() -> None:
    for view in OTHERS:
        with pytest.raises(click.UsageError) as refused:
            parse_output("flame.html", view, VIEWS)
        assert refused.value.message == (
            "-o flame.html: give table, json or yaml; --cpu-profile can be written to a file"
        )


def test_a_file_is_written_with_the_rights_of_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        parse_output(str(tmp_path / "cpu.folded"), VIEW, VIEWS).write(story(), SESSION)
    finally:
        os.umask(before)
    path = tmp_path / "cpu.folded"
    assert path.read_text() == "main;work 7\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_that_was_there_is_replaced_whole_also_behind_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "cpu.folded", tmp_path / "link.folded"
    path.write_text("old")
    link.symlink_to(path)
    reader = path.open()
    parse_output(str(link), VIEW, VIEWS).write(story(), SESSION)
    assert link.is_symlink()
    assert path.read_text() == "main;work 7\n"
    assert reader.read() == "old"  # whoever reads it meanwhile has the old one
    reader.close()


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "cpu.folded"
    output = parse_output(str(path), VIEW, VIEWS)
    path.mkdir()  # in its place since then
    with pytest.raises(OSError, match="directory"):
        output.write(story(), SESSION)
    assert list(tmp_path.iterdir()) == [path]
