"""``medseg-trt completion``: the completion script of a shell."""

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import output_options, print_result

PROGRAM, VARIABLE = "medseg-trt", "_MEDSEG_TRT_COMPLETE"  # Click derives the variable's name from the program's


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt completion bash >> ~/.bashrc",
        "medseg-trt completion zsh >> ~/.zshrc",
        "medseg-trt completion fish > ~/.config/fish/completions/medseg-trt.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output_options
def completion(shell: str, as_json: bool) -> None:
    """Print the completion script of a shell: bash, zsh or fish."""
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    assert completer is not None, "Click has the three shells of the choice"
    script = completer(click.get_current_context().find_root().command, {}, PROGRAM, VARIABLE).source()
    print_result(as_json, {"shell": shell, "script": script}, script)
