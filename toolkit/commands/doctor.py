"""``medseg-trt doctor``: list what this machine can run."""

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import output_options, print_result


@click.command(cls=ExampleCommand, examples=("medseg-trt doctor", "medseg-trt doctor --json"))
@output_options
def doctor(as_json: bool) -> None:
    """List what this machine can run, and how to install the rest."""
    from dataclasses import asdict

    from medseg_trt.doctor import examine

    findings = examine()
    lines = [f"{'yes' if finding.ready else 'no ':3}  {finding.ability}: {finding.detail}" for finding in findings]
    print_result(as_json, {"abilities": [asdict(finding) for finding in findings]}, "\n".join(lines))
