"""What the demonstration says of itself, between what its commands show."""

from __future__ import annotations

import click


def say(text: str) -> None:
    """Says what comes next."""
    click.secho(f"\n# {text}", bold=True)
