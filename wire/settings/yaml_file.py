"""A YAML file, read so that no content of it blocks, fills the memory or is taken for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from coral.wire.settings.files import read_regular

_MOST_BYTES: Final = 256 << 10
_MOST_DEPTH: Final = 16
_MOST_VALUES: Final = 100_000


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError, with what is wrong and where."""
    try:
        content = read_regular(path, _MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"not UTF-8: byte {content[error.start]:#04x} in line {line}") from error
    values = _parse(text)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError("a mapping of keys to values is expected")
    return values


def _parse(text: str) -> object:
    import yaml  # noqa: PLC0415  a megabyte that a process without a file never needs

    try:
        return yaml.load(text, _loader())  # noqa: S506  a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"not YAML: {error.problem or error.context}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    except (ValueError, KeyError, AttributeError, OverflowError) as error:
        # A scalar with a tag that it does not fit, such as a 13th month.
        raise ValueError(f"not YAML: a value that does not fit its type: {error}") from error


def _loader() -> type[Any]:
    """A SafeLoader that refuses aliases that grow to any size, and keys that are given twice."""
    import yaml  # noqa: PLC0415

    class Loader(yaml.SafeLoader):
        _depth = 0

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self._depth == _MOST_DEPTH:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=mark)
            self._depth += 1
            node = super().compose_node(parent, index)
            self._depth -= 1
            return node

        def get_single_node(self) -> yaml.Node | None:
            node: yaml.Node | None = super().get_single_node()
            if node and _expanded(node, {}, _MOST_DEPTH) > _MOST_VALUES:
                raise yaml.YAMLError("with its aliases resolved, it has too many values")
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                if isinstance(key, yaml.ScalarNode):
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def _expanded(node: Any, sizes: dict[int, int], depth: int) -> int:  # noqa: ANN401  a yaml.Node
    """How many values NODE has, with aliases counted each time; too many for one that is nested
    more than DEPTH levels deep, or in itself. SIZES are known by id."""
    if not isinstance(node.value, list):
        return 1
    if depth == 0:
        return _MOST_VALUES + 1
    if id(node) not in sizes:
        below = (
            each for item in node.value for each in (item if isinstance(item, tuple) else [item])
        )
        sizes[id(node)] = 1 + sum(_expanded(each, sizes, depth - 1) for each in below)
    return sizes[id(node)]
