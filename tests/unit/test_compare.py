"""Comparisons: what is compared on which budget, who reaches a reward first, what the page says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from motionrft.core.errors import ConfigError
from motionrft.evaluation.races import mean_curve, race, time_to_reach
from motionrft.finetune.strategies import STRATEGIES, AlignProp, DRaFT, EasyTune, ReFL
from motionrft.finetune.strategies.names import known_names, strategy_named
from motionrft.training.recipes.compare import (
    CompareRecipe,
    Comparison,
    batches_for,
    entries,
    single_task,
)
from motionrft.training.recipes.evaluate import EvaluateRecipe, RewardFolders
from motionrft.training.recipes.finetune import FinetuneRecipe

WEIGHTS = {"semantic": 1.0, "preference": 0.002, "authenticity": 0.002, "similarity": 0.5, "smoothness": 0.1}
RECIPE = FinetuneRecipe(strategy=EasyTune(window=4), weights=WEIGHTS, num_steps=10, batches=6)
REWARD = RewardFolders("/reward", "/preference", "/authenticity")


def comparison(place: Path, **changes: object) -> Comparison:
    compare = CompareRecipe(**{"methods": ("easytune", "draft-50", "refl-3"), "seeds": 2, **changes})
    found = entries(compare, RECIPE, REWARD)
    return Comparison(compare, found, "/data", "/model", {"A": "/a"}, EvaluateRecipe(), 7, place)


def test_every_method_has_a_short_name() -> None:
    own = EasyTune(window=4)
    assert strategy_named("draft-50", own) == DRaFT(last_steps=50)
    assert strategy_named("refl-10", own) == ReFL(last_steps=10)
    assert strategy_named("easytune", own) is own and strategy_named("easytune-7", own).window == 7
    assert strategy_named("alignprop-bernoulli", own) == AlignProp(mode="bernoulli")
    assert strategy_named("easytune-chain", own).variant == "chain"
    for name in STRATEGIES:
        assert isinstance(strategy_named(name.replace("_", "-"), own), STRATEGIES[name])
    for name in known_names():
        strategy_named(name.replace("-K", "-3"), own)
    for wrong in ("drafted", "draft-0", "draft-x", "refl-10-x"):
        with pytest.raises(ConfigError, match="methods"):
            strategy_named(wrong, own)


def test_single_task_rows_keep_rule_based_guards() -> None:
    assert single_task(WEIGHTS) == {**WEIGHTS, "preference": 0.0, "authenticity": 0.0, "similarity": 0.0}


def test_easytune_is_single_task_without_curriculum_and_motionrft_is_everything() -> None:
    compare = CompareRecipe(methods=("easytune", "motionrft", "draft-10"), rates={"draft-10": 3e-4})
    easytune, full, draft = entries(compare, RECIPE, REWARD)
    assert easytune.recipe.strategy == EasyTune(window=4, timesteps="last")
    assert easytune.recipe.weights == draft.recipe.weights == single_task(WEIGHTS)
    assert full.recipe.strategy == RECIPE.strategy and full.recipe.weights == WEIGHTS
    assert draft.recipe.optim.lr == 3e-4 and easytune.recipe.optim.lr == RECIPE.optim.lr


def test_ablations_switch_one_thing_each() -> None:
    compare = CompareRecipe(
        methods=(), ablate=("reward", "curriculum", "spl", "noise_aware", "terms"), without_spl="/bare"
    )
    found = {entry.name: entry for entry in entries(compare, RECIPE, REWARD)}
    full = found.pop("motionrft")
    assert found["no_reward"].recipe == replace(full.recipe, weights=single_task(WEIGHTS))
    assert found["no_curriculum"].recipe == replace(full.recipe, strategy=EasyTune(window=4, timesteps="last"))
    assert found["no_spl"].reward == RewardFolders("/bare") and full.reward == REWARD
    assert found["reads_x_prev"].recipe.strategy == EasyTune(window=4, score="x_prev")
    for name in WEIGHTS:
        assert found[f"no_{name}"].recipe.weights == {**WEIGHTS, name: 0.0}
    assert len(found) == 4 + len(WEIGHTS)


def test_contradictions_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        CompareRecipe(methods=("easytune", "dratf"), ablate=("spl", "taste"), seeds=0, split="train")
    assert all(word in str(caught.value) for word in ("dratf", "taste", "without_spl", "seeds", "split"))
    with pytest.raises(ConfigError, match="every method once"):
        entries(CompareRecipe(methods=("refl-10", "refl-10")), RECIPE, REWARD)


def test_all_methods_make_the_updates_of_the_first(tmp_path: Path) -> None:
    made = comparison(tmp_path)
    assert made.updates == 6 * 4
    assert [batches_for(e.recipe.strategy, 10, made.updates) for e in made.entries] == [6, 24, 24]
    assert batches_for(EasyTune(window=4), 10, 30) == 8  # at least as many
    jobs = {stage.name: stage.config for stage in made.stages() if not stage.name.startswith("cost_")}
    assert list(jobs) == [f"{n}_{s}" for s in (0, 1) for n in ("easytune", "draft-50", "refl-3")]
    assert {job["recipe"]["optim"]["schedule"] for job in jobs.values()} == {"constant"}
    assert {job["seed"] for name, job in jobs.items() if name.endswith("_1")} == {8}
    assert jobs["easytune_0"]["as_long_as"] == "" and jobs["refl-3_1"]["as_long_as"] == str(tmp_path / "easytune_1")
    json.dumps([stage.config for stage in made.stages()])  # what reaches a worker is plain
    timed = comparison(tmp_path, seconds=5.0, updates=30).stages()
    fixed = {s.name: s.config for s in timed if not s.name.startswith("cost_")}
    assert all(job["as_long_as"] == "" and job["recipe"]["snapshot_seconds"] == [5.0] for job in fixed.values())


def test_who_reaches_a_level_first() -> None:
    slow, fast = [(0.0, 0.1), (10.0, 0.3), (20.0, 0.5)], [(0.0, 0.1), (2.0, 0.5), (4.0, 0.9)]
    assert time_to_reach(slow, 0.4) == pytest.approx(15) and time_to_reach(slow, 0.6) is None
    assert time_to_reach(slow, 0.05) == 0.0
    assert mean_curve([slow, fast])[1] == (6.0, 0.4)
    found = race({"slow": [slow], "fast": [fast]})
    ahead = found["fast"]["slow"]
    assert ahead["seconds"] == pytest.approx(2) and ahead["speedup"] == pytest.approx(10)
    assert found["slow"]["fast"] == {"seconds": None, "speedup": None}
    assert found["slow"]["slow"]["speedup"] == pytest.approx(1) and not math.isnan(found["fast"]["fast"]["seconds"])
