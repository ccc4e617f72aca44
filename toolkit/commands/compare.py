"""``medseg-trt compare``: compare two reports of ``bench``."""

from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import ANY, output_options, print_json, print_table, print_text


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt compare old-report new-report",
        "medseg-trt compare old-report new-report --gate speed=0.97x,dice=-0.005",
    ),
)
@click.argument("before", type=ANY)
@click.argument("after", type=ANY)
@click.option("--gate", help="Limits, e.g. speed=0.97x,dice=-0.005; exit code 3 (dice) or 4 (speed) if one fails.")
@output_options
def compare(before: Path, after: Path, gate: str | None, as_json: bool) -> None:
    """Compare two reports of 'bench': speed and Dice.

    BEFORE and AFTER are report folders or report.json files. If both contain the same reference on the same machine,
    the speeds relative to the reference are compared.
    """
    from medseg_trt.bench.compare import HEADER, cells, compare_reports, judge, withheld_factors
    from medseg_trt.bench.limits import Gate, parse_gate, require
    from medseg_trt.bench.report_file import read_bench_report
    from medseg_trt.spec import to_dict

    limits = parse_gate(gate) if gate is not None else Gate()
    comparison = compare_reports(read_bench_report(before), read_bench_report(after))
    judged = judge(comparison, limits)
    if as_json:
        print_json({**to_dict(comparison), "gate": [limit.to_dict() for limit in judged]})
    else:
        header, *rows = zip(HEADER, *cells(comparison), strict=True)  # one column per network
        print_table(f"{before} → {after}: the network alone, 90 % intervals", header, rows)
        for note in [*withheld_factors(comparison), *comparison.notes, *map(str, judged)]:
            print_text(note)
        if any("*" in cell for cell in rows[2]):
            print_text("* from the speeds relative to the reference, which both reports measured in the same rounds")
    require(judged)
