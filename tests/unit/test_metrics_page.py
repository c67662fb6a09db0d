"""Pages name only metrics that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT

NAME = re.compile(r"\bcoral_(?:colony|agent|profile|syscall|tls|http)_[a-z_]*[a-z]\b(?!…|_|\*)")
HISTOGRAMS = re.compile(r"_(?:bucket|count|sum)$")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_a_page_names_only_metrics_of_the_list(page: Path) -> None:
    listed = set(NAME.findall((ROOT / "docs/metrics.md").read_text()))
    named = {HISTOGRAMS.sub("", name) for name in NAME.findall(page.read_text())}
    assert named - listed == set()
