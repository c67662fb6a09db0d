"""The kinds of collectors that can be shown. A new one is a line here: its folder's name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from coral.views.contract import View

_FOLDERS: Final = (
    "syscall_stats",
    "tcp_metrics",
    "http_latency",
    "cpu_profile",
)


def _view(folder: str) -> View:
    view = import_module(f"coral.views.{folder}").VIEW
    if not isinstance(view, View):
        raise TypeError(f"coral.views.{folder}.VIEW is not a View")
    return view


VIEWS: Final[Mapping[int, View]] = {view.kind: view for view in map(_view, _FOLDERS)}
