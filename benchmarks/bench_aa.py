"""How often does the timing report a difference where there is none? A network is compared with itself repeatedly.

    python benchmarks/bench_aa.py --bundle model.medseg [--comparisons 40] [--duration-s 3] [--backend onnxruntime]

Every comparison opens two sessions of the same graph and times them like rows of `bench`. Of 90 % intervals of the
ratio, 10 % should exclude 1, half of these on either side. Then the second session is made 3 % slower by a busy loop.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from results_file import options, publish, table

from medseg_trt.bench.measure import interleaved_rounds, tier
from medseg_trt.bundles.bundle import Bundle, load_bundle
from medseg_trt.metrics.intervals import Interval, speed_interval
from medseg_trt.sessions.open import open_session
from medseg_trt.timing import timed_runs

SLOWER = 0.03


def compare(bundle: Bundle, backend: str, duration_s: float, slower: float) -> Interval:
    """Return how many times as fast the second of two equal networks is, made slower by this share."""
    batch = np.random.default_rng(0).random((1, 3, *bundle.preprocessing.image_size), np.float32)
    with open_session(bundle, backend) as first, open_session(bundle, backend) as second:

        def waiting() -> None:
            began = time.perf_counter()
            second.run(batch)
            end = began + (1 + slower) * (time.perf_counter() - began)
            while time.perf_counter() < end:
                pass

        calls = {"first": lambda: first.run(batch), "second": waiting if slower else lambda: second.run(batch)}
        timed = {name: lambda seconds, runs, call=call: timed_runs(call, seconds, runs) for name, call in calls.items()}
        times = interleaved_rounds(timed, tier("quick", duration_s=duration_s))
    return speed_interval(times["first"].rounds_ms, times["second"].rounds_ms, interleaved=True)


def to_markdown(result: Any) -> str:
    """Return the results as a page."""
    rows = [
        (
            row["what"],
            str(row["comparisons"]),
            str(row["faster"]),
            str(row["slower"]),
            f"{row['median']:.4f}",
            f"{row['median_width']:.4f}",
        )
        for row in result["rows"]
    ]
    header = ("second network", "comparisons", "said faster", "said slower", "median ratio", "median width")
    return "\n".join(
        [
            "# The same network against itself",
            "",
            f"{result['network']}; {result['duration_s']:g} s a row, {result['rounds']} rounds. "
            "Of 90 % intervals one in twenty may miss on either side.",
            "",
            *table(header, rows),
            "",
        ]
    )


def main() -> None:
    """Measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--comparisons", type=int, default=40)
    parser.add_argument("--duration-s", type=float, default=3.0)
    chosen = parser.parse_args()
    bundle = load_bundle(chosen.bundle)
    rows, rounds = [], 0
    for label, slower in (("the same", 0.0), (f"{SLOWER:.0%} slower", SLOWER)):
        intervals = [compare(bundle, chosen.backend, chosen.duration_s, slower) for _ in range(chosen.comparisons)]
        rounds = intervals[0].units
        rows.append(
            {
                "what": label,
                "comparisons": len(intervals),
                "faster": sum(interval.low > 1 for interval in intervals),
                "slower": sum(interval.high < 1 for interval in intervals),
                "median": float(np.median([interval.estimate for interval in intervals])),
                "median_width": float(np.median([interval.high - interval.low for interval in intervals])),
                "intervals": [[interval.low, interval.estimate, interval.high] for interval in intervals],
            }
        )
    with open_session(bundle, chosen.backend) as session:
        network = session.description
    result = {"network": network, "duration_s": chosen.duration_s, "rounds": rounds, "rows": rows}
    publish("aa", result, to_markdown, chosen)


if __name__ == "__main__":
    main()
