"""``medseg-trt compare``: say what changed from one report to another."""

from pathlib import Path

import click

from medseg_trt.commands.options import ANY, output_options, print_json, print_table


@click.command()
@click.argument("before", type=ANY)
@click.argument("after", type=ANY)
@click.option("--gate", help="Limits that must hold, e.g. speed=1.2x,dice=-0.005; exit code 3 or 4 where not.")
@output_options
def compare(before: Path, after: Path, gate: str | None, as_json: bool) -> None:
    """Compare two reports of bench, network by network: speed and Dice, with 90 % intervals."""
    from medseg_trt.bench.compare import HEADER, cells, compare_reports, judge
    from medseg_trt.bench.limits import Gate, parse_gate, require
    from medseg_trt.report.schema import read_report
    from medseg_trt.spec import to_dict

    limits = parse_gate(gate) if gate is not None else Gate()
    comparison = compare_reports(read_report(before), read_report(after))
    judged = judge(comparison, limits)
    if as_json:
        verdicts = [{**to_dict(each), "holds": each.holds} for each in judged]
        print_json({**to_dict(comparison), "gate": verdicts})
    else:
        header, *rows = zip(HEADER, *cells(comparison), strict=True)  # a column each: figures are many
        print_table(f"{before} → {after}: the network alone, 90 % intervals", header, rows)
        for note in [*comparison.notes, *map(str, judged)]:
            click.echo(note)
        if any("*" in cell for cell in rows[2]):
            click.echo("* by the speeds against the reference, which was measured in turn in both reports")
    require(judged)
