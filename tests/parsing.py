"""Parse a command line as ``medseg-trt`` does, without running it."""

import shlex

import click

from medseg_trt.cli import cli


def parse(line: str) -> click.Context:
    """Return the context of the command that a line calls; what follows ``>``, ``>>`` or ``&&`` is left out.

    Raises:
        click.UsageError: the line is no command, or has wrong options.
    """
    words = shlex.split(line, comments=True)
    words = words[: next((index for index, word in enumerate(words) if word in (">", ">>", "&&")), len(words))]
    context = cli.make_context(words[0], words[1:])
    while isinstance(group := context.command, click.Group):
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None, "an unknown command raises"
        context = command.make_context(name, rest, parent=context)
    return context
