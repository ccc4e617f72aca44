"""A short run of both fuzzers; ``python -m fuzz`` runs them for hours."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest
from fuzz.campaign import LONGEST_S, MAX_GROWTH_MB, Campaign
from fuzz.targets import TARGETS, Target
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import read_image

CASES = {"readers": 600, "bundles": 300}  # 4 s and 8 s on an idle core
MIN_SHARE = {"read": 0.02, "refused": 0.2}  # a fuzzer whose mutants are all refused, or all read, reaches nothing


@pytest.fixture(scope="module", params=list(TARGETS))
def campaign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(TARGETS[request.param](tmp_path_factory.mktemp("fuzz")))


def test_every_mutant_is_read_or_refused_in_one_line(campaign: Campaign):
    @seed(0)
    @settings(
        max_examples=CASES[campaign.target.name],
        deadline=None,
        database=None,
        suppress_health_check=list(cast("Iterable[HealthCheck]", HealthCheck)),
    )
    @given(st.integers(0, 2**64 - 1))
    def fuzzed(case: int) -> None:
        campaign.run([case])

    fuzzed()
    outcomes = campaign.outcomes
    print(f"{campaign.target.name}: {dict(outcomes)}, slowest {campaign.slowest_s:.2f} s, {campaign.growth_mb:.0f} MB")
    assert outcomes.total() == CASES[campaign.target.name]
    assert campaign.crashes == {}
    assert campaign.unclear == {}
    assert campaign.slow == {}, f"more than {LONGEST_S} s of processor time"
    assert campaign.growth_mb <= MAX_GROWTH_MB
    for outcome, share in MIN_SHARE.items():
        assert outcomes[outcome] >= share * outcomes.total()


def fails(case: int) -> None:
    if case == 3:
        raise KeyError(case)
    if case == 4:
        raise InputError("two\nlines")


def test_a_campaign_tells_crashes_and_messages_of_two_lines():
    campaign = Campaign(Target(name="planted", run=fails, kinds=()))
    campaign.run(range(6))
    assert campaign.outcomes == {"read": 4, "crash": 1, "refused": 1}
    assert list(campaign.crashes) == [3]
    assert list(campaign.unclear) == [4]


def test_every_fuzz_seed_file_is_readable_undamaged(tmp_path: Path):
    """A damaged seed would be refused before any mutation matters."""
    TARGETS["readers"](tmp_path)
    for path in (tmp_path / "seeds").iterdir():
        assert read_image(path).pixels.size
