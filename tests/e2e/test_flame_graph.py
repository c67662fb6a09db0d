"""The flame graphs of `cpu_profile` in a real browser: drawn, searched, zoomed, and safe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from coral.views.cpu_profile.html import page
from coral.views.cpu_profile.names import visible
from coral.views.cpu_profile.profile import Frame, Profile
from coral.views.cpu_profile.session import Facts
from coral.views.cpu_profile.svg import picture
from tests.browser import Browser, browser
from tests.profiles import GUESS, HOSTILE, KERNEL, START_NS, TOO_SHORT, UNNAMED, Stack, profile_of

KERNEL_FRAME: Final = Frame("do_syscall_64", "[kernel]", 4096, "", KERNEL)
FACTS: Final = Facts("shop <b>&\"'", START_NS, 1.0, "expired", 3, {"subscriber_queue": 4})
MINIMAL: Final = (
    Stack(["main", "serve", "parse"], 40),
    Stack(["main", "serve", "parse", "serve", "parse"], 20),
    Stack(["main", "read", KERNEL_FRAME], 30),
    Stack(["main", Frame("guessed", "/lib/libg.so", 7, "", GUESS)], 4),
    Stack([Frame("shop+0x1234", "/usr/bin/shop", 0x1234, "", UNNAMED)], 2),
    Stack(["orphan", "leaf"], 4, end=TOO_SHORT),
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


def opened(chromium: Browser, folder: Path, profile: Profile, suffix: str) -> Browser:
    path = folder / f"flame{suffix}"
    path.write_text((page if suffix == ".html" else picture)(profile, FACTS), encoding="utf-8")
    chromium.open(path)
    assert chromium.requests == [path.as_uri()]
    return chromium


def frames(chromium: Browser) -> dict[str, float]:
    """What the page shows: the shares of the graph's width by label, the widest of a label."""
    shown = chromium.value(
        "[...document.querySelectorAll('#graph .f')]"
        ".map(e => [e.textContent, parseFloat(e.style.width)])"
    )
    widths: dict[str, float] = {}
    for label, width in shown:
        widths[label] = max(widths.get(label, 0), width)
    return widths


def frame(label: str) -> str:
    """A script that finds the outermost frame with a label."""
    return f"[...document.querySelectorAll('.f')].find(e => e.textContent === {json.dumps(label)})"


def box(name: str) -> str:
    """The same in an SVG, by the first line of its title."""
    return (
        "[...document.querySelectorAll('g.f')].find(e => "
        f"e.querySelector('title').textContent.split('\\n')[0] === {json.dumps(name)})"
    )


def test_a_page_draws_shares_and_marks(chromium: Browser, tmp_path: Path) -> None:
    opened(chromium, tmp_path, profile_of(*MINIMAL), ".html")
    widths = frames(chromium)
    assert widths["all"] == 100
    assert widths["main"] == pytest.approx(94)
    assert [widths["serve"], widths["read"]] == pytest.approx([60, 30])
    assert widths["do_syscall_64 [k]"] == pytest.approx(30)
    assert widths["~ guessed"] == pytest.approx(4)
    assert widths["[cut]"] == widths["orphan"] == pytest.approx(4)
    facts = chromium.value("document.getElementById('facts').innerText").splitlines()
    assert facts[0] == "100 samples, 1.01s of CPU time (1.01 CPUs), 30% in the kernel"
    assert "3 samples lost in the kernel" in facts
    assert (
        "4 samples (4.0%) without the outermost callers, shown under [cut]: 4 copy too short"
        in (facts)
    )
    assert "4 rows of samples lost on the way (subscriber_queue)" in facts
    assert chromium.complaints == []


def test_the_pointer_tells_self_and_total(chromium: Browser, tmp_path: Path) -> None:
    opened(chromium, tmp_path, profile_of(*MINIMAL), ".html")
    chromium.point(frame("serve"))
    chromium.until("document.getElementById('details').textContent.startsWith('serve')")
    details = chromium.value("document.getElementById('details').textContent")
    assert "in /usr/bin/shop" in details
    assert "self 0 (0.00%" in details
    assert "total 60 (60.00%" in details
    chromium.point(frame("~ guessed"))
    chromium.until("document.getElementById('details').textContent.includes('by guess')")


def test_a_click_zooms_and_escape_zooms_out(chromium: Browser, tmp_path: Path) -> None:
    opened(chromium, tmp_path, profile_of(*MINIMAL), ".html")
    chromium.click(frame("serve"))
    widths = frames(chromium)
    assert widths["serve"] == widths["main"] == widths["all"] == 100
    assert "read" not in widths
    above = chromium.value("[...document.querySelectorAll('.above')].map(e => e.textContent)")
    assert sorted(above) == ["all", "main"]
    chromium.press("Escape")
    assert frames(chromium)["serve"] == pytest.approx(60)
    assert chromium.value("document.getElementById('back').disabled")


def test_a_search_counts_each_sample_once(chromium: Browser, tmp_path: Path) -> None:
    opened(chromium, tmp_path, profile_of(*MINIMAL), ".html")
    chromium.press("/")
    chromium.type("SERV")
    chromium.until("document.getElementById('matched').textContent !== ''")
    # Recursion has `serve` twice on a stack of 20.
    matched = chromium.value("document.getElementById('matched').textContent")
    assert matched == "1 function, 60.00% of samples"
    marked = chromium.value("[...document.querySelectorAll('.m')].map(e => e.textContent)")
    assert set(marked) == {"serve"}
    chromium.press("Escape")
    chromium.until("document.getElementById('matched').textContent === ''")
    assert chromium.value("document.querySelectorAll('.m').length") == 0


def test_the_arrow_keys_walk_the_graph(chromium: Browser, tmp_path: Path) -> None:
    opened(chromium, tmp_path, profile_of(*MINIMAL), ".html")
    chromium.value("document.getElementById('graph').focus()")
    for key, label in (
        ("ArrowDown", "main"), ("ArrowDown", "serve"), ("ArrowRight", "read"),
        ("ArrowLeft", "serve"), ("ArrowUp", "main"),
    ):  # fmt: skip
        chromium.press(key)
        assert chromium.value("document.querySelector('.at').textContent") == label
    chromium.press("ArrowDown")
    chromium.press("Enter")
    assert frames(chromium)["serve"] == 100


def test_the_table_has_self_and_total_of_functions(chromium: Browser, tmp_path: Path) -> None:
    opened(chromium, tmp_path, profile_of(*MINIMAL), ".html")
    chromium.click("document.getElementById('switch')")
    rows: list[Any] = chromium.value(
        "[...document.querySelectorAll('#functions tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    table = {row[3]: (row[0], row[1]) for row in rows}
    assert table["parse"] == ("60.00%", "60.00%")
    assert table["serve"] == ("0.00%", "60.00%")
    assert table["main"] == ("0.00%", "94.00%")
    assert sum(float(own[:-1]) for own, _ in table.values()) == pytest.approx(100)
    assert "[cut]" not in table
    chromium.click("document.querySelector('#functions [data-by=total]')")
    first = "document.querySelector('#functions tbody tr').cells[3].textContent"
    assert chromium.value(first) == "main"


def test_a_phone_has_the_graph_and_the_names_in_the_table(
    chromium: Browser, tmp_path: Path
) -> None:
    with chromium.screen(360, 740):
        opened(chromium, tmp_path, profile_of(*MINIMAL, Stack(["main", "x" * 300], 20)), ".html")
        page_px = "document.documentElement.scrollWidth"
        assert chromium.value(page_px) == 360
        chromium.click(frame("serve"))
        assert frames(chromium)["serve"] == 100
        chromium.click("document.getElementById('switch')")
        names = chromium.value(
            "[...document.querySelectorAll('#functions tr')]"
            ".map(r => r.cells[3].getBoundingClientRect()).map(r => [r.left, r.right])"
        )
        assert all(left >= 0 and right <= 360 and right - left > 150 for left, right in names)
        assert chromium.value(page_px) == 360
    assert chromium.complaints == []


@pytest.mark.parametrize("suffix", [".html", ".svg"])
def test_without_colours_the_kernel_marks_and_guesses_are_told_apart(
    chromium: Browser, tmp_path: Path, suffix: str
) -> None:
    """By their letters and lines, which a print in greys has too."""
    opened(chromium, tmp_path, profile_of(*MINIMAL), suffix)
    text = "" if suffix == ".html" else ".querySelector('text')"
    find = frame if suffix == ".html" else box

    def style(label: str) -> tuple[str, str, str]:
        shown = f"getComputedStyle({find(label)}{text})"
        properties = ("fontStyle", "fontWeight", "textDecorationLine")
        return tuple(chromium.value(f"{shown}.{name}") for name in properties)

    assert style("main") == ("normal", "400", "none")
    assert style("do_syscall_64 [k]") == ("italic", "400", "none")
    assert style("~ guessed") == ("normal", "400", "underline")
    assert style("all") == ("normal", "700", "none")


@pytest.mark.parametrize("suffix", [".html", ".svg"])
def test_hostile_names_are_text(chromium: Browser, tmp_path: Path, suffix: str) -> None:
    stacks = (Stack(["main", name], 100, process=name) for name in HOSTILE)
    opened(chromium, tmp_path, profile_of(*stacks), suffix)
    assert chromium.value("document.title") == f"CPU profile of {FACTS.target}"
    assert chromium.value("document.querySelectorAll('img').length") == 0
    assert chromium.value("document.querySelectorAll('script').length") == (
        2 if suffix == ".html" else 1
    )
    assert chromium.complaints == []
    if suffix == ".html":
        found = chromium.value(
            "JSON.parse(document.getElementById('data').textContent).functions.map(f => f[0])"
        )
    else:
        found = chromium.value(
            "[...document.querySelectorAll('g.f title')].map(e => e.textContent.split('\\n')[0])"
        )
    assert {visible(name) for name in HOSTILE} <= set(found)


def test_a_picture_zooms_and_searches(chromium: Browser, tmp_path: Path) -> None:
    opened(chromium, tmp_path, profile_of(*MINIMAL), ".svg")
    width = f"Number({box('serve')}.querySelector('rect').getAttribute('width'))"
    assert chromium.value(width) == pytest.approx(0.6 * 1176, abs=1)
    chromium.click(f"{box('serve')}.querySelector('rect')")
    assert chromium.value(width) == pytest.approx(1176, abs=1)
    assert chromium.value(f"{box('read')}.getAttribute('display')") == "none"
    chromium.press("Escape")
    assert chromium.value(width) == pytest.approx(0.6 * 1176, abs=1)
    chromium.press("/")
    chromium.type("serv")
    chromium.until("document.getElementById('matched').textContent !== ''")
    matched = chromium.value("document.getElementById('matched').textContent")
    assert matched == "1 function, 60.00% of samples"
    chromium.point(f"{box('main')}.querySelector('rect')")
    chromium.until("document.getElementById('details').textContent.startsWith('main')")
    assert "94 (94%" in chromium.value("document.getElementById('details').textContent")
    assert chromium.complaints == []


def test_a_profile_without_samples_opens_and_says_so(chromium: Browser, tmp_path: Path) -> None:
    for suffix in (".html", ".svg"):
        opened(chromium, tmp_path, Profile(), suffix)
        assert "nothing ran" in chromium.value("document.documentElement.textContent")
        chromium.press("Escape")
        assert chromium.complaints == []


def test_a_file_of_fifty_thousand_stacks_is_small_and_opens(
    chromium: Browser, tmp_path: Path
) -> None:
    stacks = [
        Stack(["main", *(f"f{n >> 4 * at}" for at in (3, 2, 1)), f"leaf{n}"]) for n in range(50_000)
    ]
    profile = profile_of(*stacks)
    for suffix, most_bytes in ((".html", 6_000_000), (".svg", 6_000_000)):
        opened(chromium, tmp_path, profile, suffix)
        assert (tmp_path / f"flame{suffix}").stat().st_size < most_bytes
        assert "50,000 samples" in chromium.value("document.documentElement.textContent")
        assert chromium.complaints == []


def test_a_large_profile_is_drawn_and_searched_at_once(chromium: Browser, tmp_path: Path) -> None:
    stacks = [
        Stack([f"f{depth}_{(n >> depth) & 3}" for depth in range(60)], 1 + n % 7, tid=n % 9)
        for n in range(4000)
    ]
    opened(chromium, tmp_path, profile_of(*stacks), ".html")
    assert chromium.value("document.querySelectorAll('#graph .f').length") < 40_000
    chromium.press("/")
    chromium.type("f3_1")
    chromium.until("document.getElementById('matched').textContent !== ''")
    assert "25." in chromium.value("document.getElementById('matched').textContent")
    assert chromium.complaints == []
