"""The layout of ``--help``: commands under headings in the order of work, and examples after the options."""

from collections.abc import Sequence
from typing import Any

import click


class SectionedGroup(click.Group):
    """A group whose ``--help`` lists the commands under headings, in the order in which they were added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections: dict[str, tuple[click.Command, ...]] = {}

    def add_section(self, title: str, commands: Sequence[click.Command]) -> None:
        """Add commands under one heading."""
        self.sections[title] = tuple(commands)
        for command in commands:
            self.add_command(command)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the sections; shell completion uses this order too."""
        return [command.name or "" for commands in self.sections.values() for command in commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list per section, with all summaries in the same column."""
        names = self.list_commands(ctx)
        column = max(map(len, names), default=0)
        limit = formatter.width - column - 6
        for title, commands in self.sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [((command.name or "").ljust(column), command.get_short_help_str(limit)) for command in commands]
                )


class ExampleCommand(click.Command):
    """A command whose ``--help`` ends with commands to copy; each is a line of ``examples``."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, without wrapping them."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")
