"""Rules of the repository that no linter checks: one name for each module, nothing imported from
the current directory, only .proto files in proto/."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from tests.support import ROOT

# The folders of the top level, whose modules are imported as coral.FOLDER.
FOLDERS: Final = sorted(path.name for path in (ROOT / "src/coral").iterdir() if path.is_symlink())
NOT_SOURCES: Final = {"build", "dist", "src", "__pycache__"}
TEXTS: Final = {".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".service", ".conf", ""}

# Imports every module that is not a program, and prints all modules that have a file.
EVERY_MODULE: Final = textwrap.dedent("""
    import importlib, json, pkgutil, sys
    import benchmarks, build_hook, coral, deploy, tests
    for package in benchmarks, coral, deploy, tests:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    json.dump({name: module.__file__ for name, module in sys.modules.items()
               if getattr(module, "__file__", None)}, sys.stdout)
""")

# Words of a command line: an interpreter, and options by their meaning.
INTERPRETER: Final = re.compile(r"(?:.*/)?python(?:3(?:\.\d+)?)?|sys\.executable|\$?PYTHON")
SEPARATORS: Final = re.compile(r"[\s,'\"`()\[\]*]+")
STARTS: Final = re.compile(r"-[A-Za-z]*[mc]")
SAFE: Final = re.compile(r"-[A-Za-z]*[PI][A-Za-z]*")
WITH_VALUE: Final = {"-W", "-X"}


def sources(*suffixes: str) -> Iterator[Path]:
    """The project's files with these suffixes, except those made by a build or a test. Does not
    follow links."""
    for directory, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in NOT_SOURCES and (not name.startswith(".") or name == ".ci")
        ]
        yield from (
            Path(directory, name)
            for name in names
            if Path(name).suffix in suffixes and not name.startswith(".")
        )


def doubly_loaded(files: dict[str, str]) -> dict[str, list[str]]:
    """The project's files that are loaded under several names, with these names. FILES are the
    files of all loaded modules by module name."""
    names = defaultdict(list)
    for name, file in files.items():
        path = Path(os.path.realpath(file))
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and name != "__main__":
            names[str(path)].append(name)
    return {file: loaded for file, loaded in names.items() if len(loaded) > 1}


def test_every_module_has_one_name() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", EVERY_MODULE], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)
    assert doubly_loaded(files) == {}
    loaded = {os.path.realpath(file) for file in files.values()}
    programs = ROOT / "tests/programs"  # which are run, and not imported
    modules = {
        str(path)
        for path in sources(".py")
        if path.name != "__main__.py" and not path.is_relative_to(programs)
    }
    scripts = {"docs/generate.py", "deploy/monitoring/dashboards.py"}
    assert modules - loaded == {str(ROOT / script) for script in scripts}


def test_no_module_of_this_run_has_two_names() -> None:
    files = {
        name: str(module.__file__)
        for name, module in sys.modules.items()
        if isinstance(module, ModuleType) and getattr(module, "__file__", None)
    }
    assert "coral.bpf" in files
    assert doubly_loaded(files) == {}


@pytest.mark.parametrize("name", [*FOLDERS, "proto", "docs", "mesh"])
def test_a_folder_is_no_package_of_its_own(name: str) -> None:
    assert importlib.util.find_spec(name) is None


def test_the_page_of_the_architecture_names_every_folder_of_the_package_and_no_other() -> None:
    tree = (ROOT / "docs/architecture.md").read_text().split("```\n")[1]
    named = set(re.findall(r"([a-z0-9_]+)/", tree))
    packages = {
        path.parent.name
        for path in sources(".py")
        if path.name == "__init__.py" and path.relative_to(ROOT).parts[0] in FOLDERS
    }
    assert packages - named == set()
    above = (ROOT, *(ROOT / name for name in (*FOLDERS, "deploy", "src", "tests")))
    there = {path.name for folder in above for path in folder.iterdir() if path.is_dir()}
    assert named - packages - there == set()


def test_proto_holds_contracts_alone() -> None:
    files = [path for path in (ROOT / "proto").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".proto"}


def unsafe_starts(words: Sequence[str]) -> Iterator[str]:
    """Each interpreter among WORDS that is started with -m or -c, but with neither -P nor -I, which
    keep the current directory out of the search path for modules."""
    for at, word in enumerate(words):
        if not INTERPRETER.fullmatch(word):
            continue
        options = iter(words[at + 1 :])
        for option in options:
            if SAFE.fullmatch(option) or not option.startswith("-"):
                break
            if STARTS.fullmatch(option):
                yield f"{word} {option}"
                break
            if option in WITH_VALUE:
                next(options, None)


def words_of(node: ast.expr) -> list[str]:
    """The words of a command line in code, with those of nested lists and tuples. A word known only
    at run time becomes "-", an option without a meaning."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [word for element in elements for word in words_of(element)]
        case ast.Starred(value=ast.List() | ast.Tuple() as display):
            return words_of(display)
        case ast.Attribute(value=ast.Name(id="sys"), attr="executable"):
            return ["sys.executable"]
        case ast.Name(id="python") | ast.Attribute(attr="python"):
            return ["python"]
    return ["-"]


def unsafe_starts_in_code(code: str) -> Iterator[str]:
    """The unsafe starts in a Python program: in lists, tuples, arguments and strings."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.List() | ast.Tuple():
                yield from unsafe_starts(words_of(node))
            case ast.Call(args=arguments):
                yield from unsafe_starts([word for it in arguments for word in words_of(it)])
            case ast.Constant(value=str(text)):
                yield from unsafe_starts(SEPARATORS.split(text))
            case ast.JoinedStr(values=parts):
                text = "".join(str(getattr(part, "value", "")) for part in parts)
                yield from unsafe_starts(SEPARATORS.split(text))


def test_no_interpreter_looks_for_modules_in_the_current_directory() -> None:
    found = set()
    for path in set(sources(*TEXTS)) - {Path(__file__).resolve()}:  # it has examples of both
        text = path.read_text()
        starts = (
            unsafe_starts_in_code(text)
            if path.suffix == ".py"
            else unsafe_starts(SEPARATORS.split(text))
        )
        found |= {f"{path.relative_to(ROOT)}: {start}" for start in starts}
    assert found == set()


@pytest.mark.parametrize(
    ("code", "safe"),
    [
        ("run([sys.executable, '-m', 'pytest'])", False),
        ("run([sys.executable, '-W', 'error', '-c', code])", False),
        ("run([*prefix, *(sys.executable, '-u'), '-m', 'x'])", False),
        ("run('python3', *options, '-c', code)", False),
        ("exec(self.python, '-m', 'x')", False),
        ("x = '''run([sys.executable, '-m', 'x'])'''", False),
        ("x = f'make -j; {python} x; python -m x'", False),
        ("run([sys.executable, '-P', '-m', 'x'])", True),
        ("run([sys.executable, '-IS', '-c', code])", True),
        ("run([sys.executable, program, '-m', 'x'])", False),
        ("run([sys.executable, 'program.py', '-c', 'x'])", True),
    ],
)
def test_the_rule_for_interpreters_tells_safe_starts_from_unsafe(code: str, safe: bool) -> None:
    assert (list(unsafe_starts_in_code(code)) == []) is safe
