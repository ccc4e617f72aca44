"""A run of compute-sanitizer counts where it has watched tests that ran, not where it merely ended."""

import pytest
from gpu_free.sanitizer import nothing_checked

RAN = "59 passed, 3 skipped in 41.20s\n"
WATCHED = "========= COMPUTE-SANITIZER\n{}========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (WATCHED.format(RAN), ""),
        ("========= COMPUTE-SANITIZER\n" + RAN + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n", ""),
        (WATCHED.format("62 skipped in 0.31s\n"), "no test ran under compute-sanitizer"),
        (WATCHED.format("0 passed\n"), "no test ran"),
        (RAN, "has watched no kernel: 59 passed"),
        ("========= Error: Device not supported. Please refer to the documentation\n" + RAN, "has watched no kernel"),
        ("", "it printed nothing"),
    ],
)
def test_a_run_that_checked_nothing_is_told_from_one_that_found_nothing(output, words):
    reason = nothing_checked(output)
    assert bool(reason) is bool(words)
    assert words in reason
