"""``medseg-trt bench``: measure a bundle."""

import json
from pathlib import Path

import click

from medseg_trt.commands.options import FILE, FOLDER, output_options, print_table, verify_option


@click.command()
@click.option(
    "--bundle", "bundle_folder", type=FOLDER, help="The bundle to measure.  [default: the only *.medseg here]"
)
@click.option("--ckpt", "checkpoint", type=FILE, required=True, help="The checkpoint it was built from, the reference.")
@click.option("--data", "data_folder", type=FOLDER, required=True, help="Images to compare on.")
@click.option("--split", default="val", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--warmup-ms", type=click.FloatRange(0), default=200.0, show_default=True)
@click.option("--duration-s", type=click.FloatRange(0), default=10.0, show_default=True)
@click.option("-o", "--output", type=FOLDER, default=Path("report"), show_default=True, help="Where the report goes.")
@verify_option
@output_options
def bench(
    bundle_folder: Path | None, checkpoint: Path, data_folder: Path, split: str, batch: int, warmup_ms: float,
    duration_s: float, output: Path, verify_key: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure a bundle against PyTorch on the same images: agreement first, then speed."""
    from medseg_trt.benchmark import bench as run_bench
    from medseg_trt.bundle import find_bundle
    from medseg_trt.report import HEADER, bench_cells, write_report

    report = run_bench(
        find_bundle(bundle_folder), checkpoint, data_folder, split,
        batch=batch, warmup_ms=warmup_ms, duration_s=duration_s, verify_key=verify_key,
    )  # fmt: skip
    page = write_report(report, output)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        header, *rows = zip(
            HEADER, *bench_cells(report), strict=True
        )  # a column each: they are few, and figures are many
        print_table(f"{report.images}, batch {report.batch}", header, rows)
        click.echo(f"report: {page}")
