"""A flame graph as a page of its own: it opens from a file, and loads nothing from anywhere.

Its style, script and markup are in `flame.css`, `flame.js` and `flame.html`. Names are in the page
only as JSON, without any character that could end the element around it, and the page's policy
allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from typing import Any, Final

from coral.views.cpu_profile.assets import asset
from coral.views.cpu_profile.functions import Function
from coral.views.cpu_profile.names import visible
from coral.views.cpu_profile.profile import Profile
from coral.views.cpu_profile.session import Facts, told
from coral.views.cpu_profile.tree import Node, call_tree, least_drawn, walk

MOST_NODES: Final = 200_000
_KERNEL, _UNNAMED, _MARK = 1, 2, 4  # flame.js has the same
_PLACE: Final = re.compile("@([A-Z]+)@")


def page(profile: Profile, facts: Facts, most_nodes: int = MOST_NODES) -> str:
    """The whole page."""
    title = html.escape(f"CPU profile of {visible(facts.target)}")
    tree = call_tree(profile)
    least = least_drawn(tree, most_nodes)
    sentences = list(told(profile, facts))
    if least > 1:
        sentences.append(f"frames of fewer than {least:,} samples are left out")
    script, style = asset("flame.js"), asset("flame.css")
    texts = {
        "POLICY": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}",
        "TITLE": title,
        "STYLE": style,
        "FACTS": "".join(f"<li>{html.escape(visible(each))}</li>" for each in sentences),
        "DATA": _inline_json(_data(profile, tree, least)),
        "SCRIPT": script,
    }
    # One pass: what is put in is not looked at again.
    return _PLACE.sub(lambda match: texts[match[1]], asset("flame.html"))


def _data(profile: Profile, tree: Node, least: int) -> dict[str, Any]:
    """What flame.js draws: a row for each function, and the tree in the order of a walk."""
    numbers: dict[tuple[Function, bool], int] = {}
    functions: list[list[Any]] = []

    def number(function: Function, own: int = 0, total: int = 0, *, mark: bool = False) -> int:
        key = function, mark
        if key not in numbers:
            numbers[key] = len(functions)
            flags = _KERNEL * function.kernel | _UNNAMED * function.unnamed | _MARK * mark
            functions.append([visible(function.name), visible(function.module), flags, own, total])
        return numbers[key]

    for use in profile.uses.ordered():
        number(use.function, use.own, use.total)
    nodes: list[int] = []
    for depth, left, node in walk(tree, least):
        at = number(node.function, mark=node.mark)
        nodes += depth, at, left, node.total, node.own, node.guessed
    return {
        "samples": profile.samples,
        "period": profile.period,
        "in_cycles": profile.in_cycles,
        "functions": functions,
        "nodes": nodes,
    }


def _inline_json(data: object) -> str:
    """JSON that can stand in a `<script>` element: no `<`, so neither its end nor a comment."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    """What a content security policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
