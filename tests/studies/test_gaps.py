# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The gap along a run, and the time to a loss, on curves whose numbers are known."""

import math
import random

import pytest

from modeling_peer.studies.gaps import Gap, gap_along_the_run
from modeling_peer.studies.time_to_loss import difference_at_equal_time, time_to_loss
from modeling_peer.studies.validation_curve import ValidationCurve

STEPS = 10


def curve(loss, num_tokens=1000.0, steps=STEPS, seconds_per_token=0.1):
    """A curve with the loss `loss(tokens)` at evenly spaced evaluations."""
    tokens = [num_tokens * (step + 1) / steps for step in range(steps)]
    seconds = [seconds_per_token * one for one in tokens]
    return ValidationCurve(tuple(tokens), tuple(2 * t for t in tokens), tuple(seconds), tuple(map(loss, tokens)))


def dense(tokens):
    return 8.0 - 0.5 * math.log2(tokens)


def with_gap(at_end, slope, noise=0.0, seed=0):
    """A curve whose gap to `dense` is a line over log2(tokens), with noise at every evaluation."""
    errors = random.Random(seed)
    return curve(lambda t: dense(t) + at_end + slope * math.log2(t / 1000) + errors.gauss(0, noise))


@pytest.mark.parametrize(
    ("at_end", "slope", "verdict"),
    [
        (0.2, 0.05, "grows"),  # behind, and further behind
        (0.2, -0.05, "shrinks"),
        (0.2, 0.0, "holds"),
        (-0.2, -0.05, "grows"),  # ahead, and further ahead
        (-0.2, 0.05, "shrinks"),
        (-0.2, 0.0, "holds"),
        (0.0, 0.0, "holds"),  # the same curve
    ],
)
def test_a_line_without_noise_is_found_exactly(at_end, slope, verdict):
    contender, reference = {0: with_gap(at_end, slope)}, {0: curve(dense)}
    gap = gap_along_the_run(contender, reference)
    assert gap == Gap(1, 6, pytest.approx(at_end), pytest.approx(slope), pytest.approx(0), verdict)


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize(
    ("slope", "verdict"),
    [
        (0.05, "grows"),  # fifty times the noise of an evaluation
        (-0.05, "shrinks"),
    ],
)
def test_a_slope_above_the_noise_is_found_whatever_the_noise(num_seeds, slope, verdict):
    for trial in range(20):
        contender = {seed: with_gap(0.2, slope, 0.001, 100 * trial + seed) for seed in range(num_seeds)}
        gap = gap_along_the_run(contender, dict.fromkeys(contender, curve(dense)))
        assert gap.verdict == verdict
        assert gap.slope == pytest.approx(slope, abs=0.01)
        assert 0 < gap.slope_error < 0.01


@pytest.mark.parametrize(
    ("num_seeds", "most_false"),
    # Student's t exceeds 2 in 0.116 of the cases with 4 degrees of freedom (residuals of 6 points), in 0.184 with 2
    # (three seeds) and in 0.077 with 9 (ten seeds). The deviation of such a share over 400 trials is at most 0.02.
    [(1, 0.18), (3, 0.25), (10, 0.14)],
)
def test_a_gap_without_a_slope_holds_as_often_as_two_standard_errors_promise(num_seeds, most_false):
    verdicts = []
    for trial in range(400):
        contender = {seed: with_gap(0.2, 0.0, 0.01, 100 * trial + seed) for seed in range(num_seeds)}
        verdicts.append(gap_along_the_run(contender, dict.fromkeys(contender, curve(dense))).verdict)
    share = 1 - verdicts.count("holds") / len(verdicts)
    assert 0.02 < share < most_false


def test_the_error_over_seeds_is_that_of_the_mean_slope():
    contender = {0: with_gap(0.2, 0.01), 1: with_gap(0.2, 0.02), 2: with_gap(0.2, 0.06)}
    gap = gap_along_the_run(contender, dict.fromkeys(contender, curve(dense)))
    assert gap.slope == pytest.approx(0.03)
    assert gap.slope_error == pytest.approx(math.sqrt(((0.02**2 + 0.01**2 + 0.03**2) / 2) / 3), abs=1e-6)
    assert gap.verdict == "holds"


def test_what_happens_in_the_first_half_does_not_count():
    reference = curve(dense)
    contender = curve(lambda t: dense(t) + (0.3 if t >= 500 else 2.0 - t / 1000))
    gap = gap_along_the_run({0: contender}, {0: reference})
    assert (gap.at_end, gap.slope, gap.verdict) == (pytest.approx(0.3), pytest.approx(0), "holds")


def test_runs_without_a_partner_are_left_out_and_two_points_give_no_error():
    few = {seed: curve(lambda t: dense(t) + t / 1e4, steps=2) for seed in range(3)}
    gap = gap_along_the_run(few, {0: curve(dense, steps=2)})
    assert (gap.pairs, gap.points, gap.slope_error, gap.verdict) == (1, 2, None, "unknown")
    assert gap_along_the_run(few, {7: curve(dense)}) is None
    assert gap_along_the_run({0: curve(dense, steps=1)}, {0: curve(dense)}) is None


def test_a_longer_run_is_compared_up_to_the_end_of_the_shorter_one():
    contender = curve(lambda t: dense(t) + 0.1, num_tokens=2000.0, steps=25)
    gap = gap_along_the_run({0: contender}, {0: curve(dense)})
    assert gap.at_end == pytest.approx(0.1)
    assert gap.points == 6  # at 560, 640, ... 960 tokens, where the reference has no evaluations


def test_the_time_to_a_loss_is_interpolated_on_the_curve_of_the_contender():
    # linear in log2(tokens), so that the interpolation is exact: half a nat ahead is half of the tokens
    ahead = {seed: curve(lambda t: dense(t) - 0.5, seconds_per_token=0.3) for seed in range(2)}
    found = time_to_loss(ahead, {0: curve(dense), 1: curve(dense)}, ms_per_token=100.0)
    assert (found.pairs, found.reached) == (2, 2)
    assert found.tokens == [pytest.approx(500), 0]
    assert found.seconds == [pytest.approx(150), 0]
    assert found.measured_seconds == [pytest.approx(50), 0]


def test_the_reference_takes_its_whole_run_to_its_final_loss():
    runs = {0: curve(dense), 1: curve(dense, seconds_per_token=0.3)}
    found = time_to_loss(runs, runs, ms_per_token=None)
    assert found.tokens == [1000, 0]
    assert found.seconds[0] == 200
    assert found.measured_seconds == [None, None]


def test_a_loss_that_is_not_reached_counts_as_such_seed_by_seed():
    contender = {0: curve(lambda t: dense(t) - 0.5), 1: curve(lambda t: dense(t) + 0.5), 2: curve(dense)}
    found = time_to_loss(contender, {0: curve(dense), 1: curve(dense)}, None)
    assert (found.pairs, found.reached) == (2, 1)
    assert found.seconds == [pytest.approx(50), None]
    none = time_to_loss({1: contender[1]}, {1: curve(dense)}, None)
    assert (none.reached, none.seconds) == (0, [None, None])


def test_at_equal_time_a_slower_contender_is_in_the_middle_of_its_run():
    # a step twice as long: 500 tokens when the reference ends, half a nat before the loss at 1000
    slower = {seed: curve(dense) for seed in range(2)}
    found = difference_at_equal_time(slower, {0: curve(dense), 1: curve(dense)}, 0.2, 0.1)
    assert found == [pytest.approx(100 * (math.exp(0.5) - 1)), pytest.approx(0)]
    # a faster one has nothing left to train
    faster = {0: curve(lambda tokens: dense(tokens) - 0.1)}
    found = difference_at_equal_time(faster, {0: curve(dense)}, 0.05, 0.1)
    assert found == [pytest.approx(100 * (math.exp(-0.1) - 1)), None]
    # eleven times as long: its first evaluation, at a tenth of the run, is still to come
    assert difference_at_equal_time(slower, {0: curve(dense)}, 1.1, 0.1) == [None, None]
    assert difference_at_equal_time(faster, {0: curve(dense)}, None, 0.1) == [None, None]
    assert difference_at_equal_time(faster, {7: curve(dense)}, 0.1, 0.1) == [None, None]


def test_between_points_seconds_are_linear_in_tokens_and_begin_at_zero():
    one = ValidationCurve((100.0, 200.0), (1.0, 2.0), (10.0, 30.0), (5.0, 4.0))
    assert one.seconds_at(50) == 5
    assert one.seconds_at(150) == 20
    assert one.tokens_to(6.0) == 100  # reached at the first evaluation, or before
    assert one.tokens_to(4.5) == pytest.approx(100 * math.sqrt(2))
    assert one.tokens_to(3.9) is None
