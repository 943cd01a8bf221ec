"""The guard on synthetic curves: hacking alarms; honest progress, a trade-off without reward, and noise do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from motionrft.core.errors import ConfigError
from motionrft.training.guard import Guard, GuardConfig, Look

CLIPS = 200


def watched(
    reward: Sequence[float], r1: Sequence[float], fid: float | Sequence[float] = 20.0, error: float = 0.01, **config
) -> Guard:
    guard = Guard(GuardConfig(**config))
    fids = np.broadcast_to(fid, len(reward))
    for i, (r, p, f) in enumerate(zip(reward, r1, fids, strict=True)):
        guard.add(Look(10.0 * i, r, error, p, float(f), 300.0, p - max(0.0, f / fids[0] - 1), CLIPS))
    return guard


RISING = np.linspace(0.6, 0.8, 6)


def test_reward_up_while_retrieval_falls_is_an_alarm_after_patience_looks_with_numbers() -> None:
    guard = watched(RISING, [0.5, 0.6, 0.55, 0.45, 0.44, 0.43])
    assert list(guard.alarms()) == ["40", "50"]
    text = guard.alarms()["40"]
    assert text.startswith(
        "since batch 10: reward 0.64 -> 0.76 (noise 0.014), while R@1 0.600 -> 0.440 (tolerance 0.074)"
    )


def test_reward_up_while_fid_rises_is_an_alarm() -> None:
    guard = watched(RISING, [0.5] * 6, fid=[20, 20, 24, 25, 26, 27])
    assert list(guard.alarms()) == ["30", "40", "50"] and "fid 20 -> 25 (tolerance 15%)" in guard.alarms()["30"]


@pytest.mark.parametrize(
    ("reward", "r1", "fid"),
    [
        (RISING, np.linspace(0.5, 0.6, 6), np.linspace(20, 18, 6)),  # honest improvement
        (RISING, [0.5] * 6, [20, 22, 22, 22.9, 22, 22]),  # inside the tolerance
        ([0.6] * 6, np.linspace(0.6, 0.4, 6), [20] * 6),  # gets worse, but not for the reward's sake
        (np.linspace(0.6, 0.612, 6), np.linspace(0.6, 0.4, 6), [20] * 6),  # a rise within the reward's noise
        (RISING, [0.6, 0.6, 0.45, 0.6, 0.45, 0.6], [20] * 6),  # never twice in a row
    ],
)
def test_no_alarm(reward: Sequence[float], r1: Sequence[float], fid: Sequence[float]) -> None:
    assert watched(reward, r1, fid).alarms() == {}


def test_an_alarm_ends_when_the_metrics_recover() -> None:
    guard = watched(RISING, [0.6, 0.4, 0.4, 0.6, 0.6, 0.6])
    assert list(guard.alarms()) == ["20"] and guard.stop_reason() == ""


def test_false_alarms_under_noise_are_as_rare_as_documented() -> None:
    draw, p, runs = np.random.default_rng(0), 0.55, 300
    noise = (p * (1 - p) / CLIPS) ** 0.5
    shared = draw.standard_normal((runs, 1)) * 0.5**0.5
    own = draw.standard_normal((runs, 11)) * 0.5**0.5
    fall = np.linspace(0, 0.1, 11)
    rates = []
    for trend in (0 * fall, fall):
        curves = p + noise * (shared + own) - trend
        rates.append(np.mean([bool(watched(np.linspace(0.6, 0.9, 11), r1).alarms()) for r1 in curves]))
    assert rates[0] < 0.13 and rates[1] > 0.8


def test_effects_of_an_alarm_and_of_no_progress() -> None:
    hacking = ([0.5, 0.6, 0.45, 0.45], RISING[:4])
    assert watched(hacking[1], hacking[0]).stop_reason() == ""
    assert "reward hacking since batch 10" in watched(hacking[1], hacking[0], on_alarm="stop").stop_reason()
    stale = [0.5, 0.6, 0.59, 0.6, 0.58]
    assert watched(RISING[:5], stale, early_stop_patience=4).stop_reason() == ""
    assert "0.6 of batch 10 in 3 looks" in watched(RISING[:5], stale, early_stop_patience=3).stop_reason()


def test_the_best_is_a_trained_model_and_the_earliest_of_equals() -> None:
    guard = watched(RISING[:4], [0.9, 0.5, 0.7, 0.7])
    assert guard.best is not None and guard.best.batches == 20
    assert Guard(GuardConfig()).best is None and watched([0.6], [0.5], early_stop_patience=1).stop_reason() == ""


@pytest.mark.parametrize("count", [0, 3])
def test_state_round_trip(count: int) -> None:
    guard = watched(RISING[:count], [0.6, 0.45, 0.4][:count])
    again = Guard(guard.config)
    again.import_state(guard.export_state())
    assert again.looks == guard.looks and again.alarms() == guard.alarms()


def test_contradictions_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"on_alarm.*'explode'; keep.*'both'; patience.*0; sigmas"):
        GuardConfig(on_alarm="explode", keep="both", patience=0, sigmas=-1.0)
