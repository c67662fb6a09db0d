"""The versions of installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    """The version of PACKAGE; empty where it is not installed, as in a copy of the sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
