"""Fuzz for a stated time and add a row to ``benchmarks/results/fuzz.md``.

    cd tests && ../.venv/bin/python -m fuzz readers --minutes 60

Cases run in child processes of ``BATCH`` cases, so that a death of the interpreter is found and named as well.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
from fuzz.campaign import LONGEST_S, MAX_GROWTH_MB, Campaign
from fuzz.targets import TARGETS

from medseg_trt.machine import this_machine

BATCH = 500
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.md"
HEADER = f"""# Fuzzing

Mutants of small valid files (`tests/fuzz`): every one must be read, or refused by one line. A failure is any other
exception, a death of the process, more than {LONGEST_S:g} s of processor time for one file, or a peak of resident
memory more than {MAX_GROWTH_MB:g} MB above the idle process.

The causes of all crashes of a row are mended, with a test each, before the next row is measured.

| target | date | duration | cases | read | refused | crashes | over {LONGEST_S:g} s | slowest s | MB | machine |
|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|:--|
"""


@click.command()
@click.argument("target", type=click.Choice(list(TARGETS)))
@click.option("--minutes", default=60.0)
@click.option("--first", default=0, help="the first case")
def main(target: str, minutes: float, first: int) -> None:
    """Fuzz TARGET."""
    began = time.monotonic()
    until = began + 60 * minutes
    totals, failures, case = Counter[str](), list[str](), first
    slowest_s = growth_mb = 0.0
    num_slow = 0
    while time.monotonic() < until:
        failure = _in_child(target, case, until)
        case += BATCH
        if isinstance(failure, str):
            totals["crash"] += 1
            failures.append(f"a case from {case - BATCH} to {case - 1}: {failure}")
            continue
        totals.update(failure["outcomes"])
        slowest_s, growth_mb = max(slowest_s, failure["slowest_s"]), max(growth_mb, failure["growth_mb"])
        num_slow += len(failure["slow"])
        failures += [
            f"case {number}: {text}"
            for part in ("crashes", "slow", "unclear")
            for number, text in failure[part].items()
        ]
    duration_min = (time.monotonic() - began) / 60
    _write(
        f"| {target} | {time.strftime('%Y-%m-%d')} | {duration_min:.1f} min | {totals.total()} | {totals['read']} | "
        f"{totals['refused']} | {totals['crash']} | {num_slow} | {slowest_s:.2f} | {growth_mb:.0f} | {_machine()} |"
    )
    print("\n".join(failures) or "no failure")
    sys.exit(1 if failures else 0)


def _in_child(target: str, first: int, until: float) -> dict | str:
    """Run a batch in a fork; return what came of it, or how the process died."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign(TARGETS[target](Path(folder)))
            campaign.run(range(first, first + BATCH), until)
        fields = {name: getattr(campaign, name) for name in ("outcomes", "crashes", "slow", "unclear", "slowest_s")}
        with os.fdopen(writer, "w") as pipe:
            json.dump({**fields, "growth_mb": campaign.growth_mb}, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        written = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        return f"the process died: {signal.Signals(-status).name if status < 0 else f'exit code {status}'}"
    return json.loads(written)


def _machine() -> str:
    here = this_machine()
    return f"{here.processor}, {here.cores} cores, load {os.getloadavg()[0]:.1f}"


def _write(row: str) -> None:
    before = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else HEADER
    RESULTS.write_text(f"{before}{row}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
