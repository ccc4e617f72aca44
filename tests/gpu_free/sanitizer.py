"""Read what compute-sanitizer says of a run of tests: also whether it has checked any."""

import re

PASSED = re.compile(r"\b[1-9]\d* passed\b")  # pytest's
SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: 0 ", re.MULTILINE)  # the tool's, at the end of what it watched


def nothing_checked(output: str) -> str:
    """Return why a run that ended without an error has checked no kernel; empty where it has checked some.

    A tool that cannot watch a GPU, and tests that find none below the tool, end without an error, too.
    """
    last = next(reversed(output.strip().splitlines()), "it printed nothing")
    if not PASSED.search(output):
        return f"no test ran under compute-sanitizer: {last}"
    return "" if SUMMARY.search(output) else f"compute-sanitizer has watched no kernel: {last}"
