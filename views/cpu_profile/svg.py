"""A flame graph as one SVG file: a picture for any viewer; a browser zooms and searches in it.

Its style and script are in `flame_svg.css` and `flame_svg.js`. Names are in the file as escaped
text alone, without the characters that XML does not allow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Final
from zlib import crc32

from coral.views.cpu_profile.assets import asset
from coral.views.cpu_profile.names import visible
from coral.views.cpu_profile.profile import Profile
from coral.views.cpu_profile.session import Facts, told
from coral.views.cpu_profile.tree import Node, call_tree, least_drawn, walk
from coral.views.text import format_share, wrapped

MOST_NODES: Final = 20_000
_WIDTH: Final = 1200
_LEFT: Final = 12  # flame_svg.js has the same
_GRAPH: Final = _WIDTH - 2 * _LEFT
_CHARACTER: Final = 7.3  # of the widest monospace fonts at 12 pixels
_LINE: Final = 16
_ROW: Final = 17
_LEAST: Final = 0.1  # pixels; frames that would be narrower are left out
_SHADES: Final = 4  # the same function has the same everywhere
_LETTERS: Final = int(_GRAPH / _CHARACTER)
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def picture(profile: Profile, facts: Facts, most_nodes: int = MOST_NODES) -> str:
    """The whole file."""
    tree = call_tree(profile)
    least = max(least_drawn(tree, most_nodes), tree.total * _LEAST / _GRAPH)
    nodes = list(walk(tree, least)) if profile else []
    sentences = list(told(profile, facts))
    if least > 1:
        sentences.append(f"frames of fewer than {least:,.0f} samples are left out")
    lines = [line for each in sentences for line in wrapped(visible(each).split(" "), _LETTERS)]
    top = _LINE * (len(lines) + 5)
    height = top + _ROW * (1 + max((depth for depth, _, _ in nodes), default=0)) + _LINE
    title = escape(visible(f"CPU profile of {facts.target}"))
    drawn = "\n".join(_frames(nodes, top, profile))
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" \
height="{height}" role="img" aria-label="{title}">
<title>{title}</title>
<style>{asset("flame_svg.css")}</style>
<rect width="100%" height="100%" fill="#fff"/>
<text class="head" x="{_LEFT}" y="{_LINE * 1.5:.0f}">{title}</text>
{"".join(_lines(lines))}
<foreignObject x="{_LEFT}" y="{top - 44}" width="300" height="26">
<input xmlns="http://www.w3.org/1999/xhtml" id="search" placeholder="Search functions (/)" \
aria-label="Search functions"/>
</foreignObject>
<text id="back" x="{_LEFT + 312}" y="{top - 26}">Zoom out (Esc)</text>
<text id="matched" x="{_LEFT + 440}" y="{top - 26}"></text>
<text id="details" x="{_LEFT}" y="{top - 6}"></text>
{drawn}
<script><![CDATA[{asset("flame_svg.js")}]]></script>
</svg>
"""


def _lines(lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        y = round(_LINE * (2.75 + number))
        yield f'<text x="{_LEFT}" y="{y}">{_text(line)}</text>\n'


def _frames(nodes: list[tuple[int, int, Node]], top: int, profile: Profile) -> Iterator[str]:
    for depth, left, node in nodes:
        x = _LEFT + _GRAPH * left / profile.samples
        width = _GRAPH * node.total / profile.samples
        y = top + _ROW * depth
        label = _label(node)
        room = int((width - 6) / _CHARACTER)
        short = "" if room < 3 else label if len(label) <= room else label[: room - 1] + "…"  # noqa: PLR2004
        about = _text(_about(node, label, profile))
        drawn = f'y="{y}" width="{max(width - 0.5, _LEAST):.2f}" height="{_ROW - 1}"'
        yield (
            f'<g class="f {_kind(node)}" data-at="{depth} {left} {node.total}">'
            f'<title>{about}</title><rect x="{x:.2f}" {drawn}/>'
            f'<text x="{x + 3:.2f}" y="{y + 12}">{_text(short)}</text></g>'
        )


def _kind(node: Node) -> str:
    """The classes of a frame, as in flame.css."""
    function = node.function
    kind = "c" if node.mark else "k" if function.kernel else "n" if function.unnamed else "u"
    shade = f"s{crc32(function.name.encode(errors='replace')) % _SHADES}"
    return f"{kind} {shade}{' g' if node.guessed else ''}"


def _label(node: Node) -> str:
    name = visible(node.function.name)
    return f"{'~ ' if node.guessed else ''}{name}{' [k]' if node.function.kernel else ''}"


def _about(node: Node, label: str, profile: Profile) -> str:
    """What is shown of a frame under the pointer."""
    lines = [label]
    if node.function.module:
        lines.append(f"in {visible(node.function.module)}")
    for name, count in (("self", node.own), ("total", node.total)):
        share = format_share(count / profile.samples)
        lines.append(f"{name} {count:,} ({share}, {profile.amount(count)})")
    if node.guessed:
        lines.append(f"{node.guessed:,} by guess")
    return "\n".join(lines)


def _text(text: str) -> str:
    return escape(_NOT_XML.sub("?", text))
