"""Groups of commands, and how their help lists them."""

from __future__ import annotations

import click


class Commands(click.Group):
    """Commands whose help lists each one with its whole first sentence, however narrow the terminal
    is."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list."""
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command and command.help and not command.short_help:
                command.short_help = _first_sentence(command.help)
        super().format_commands(ctx, formatter)


def _first_sentence(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].removesuffix(".") + "."
