"""Comparisons of fine-tuning methods on one model: same data, seeds and budget; what `motionrft compare` runs.

Every method trains once per seed, until it has made `updates` optimiser steps and spent `seconds`; its model is kept at
either moment. The rows of the two tables therefore come from the same runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from motionrft.core.errors import ConfigError, explain
from motionrft.core.plain import to_plain
from motionrft.finetune.strategies import EasyTune, Strategy
from motionrft.finetune.strategies.names import strategy_named
from motionrft.reward.terms import LEARNED_TERMS
from motionrft.training.recipes.cost import CostJob
from motionrft.training.recipes.evaluate import BASE, REAL, EvaluateRecipe, RewardFolders, RowSpec, validation_recipe
from motionrft.training.recipes.finetune import FinetuneJob, FinetuneRecipe
from motionrft.training.stages import Stage

BUDGETS = ("updates", "seconds")
ABLATIONS = ("reward", "curriculum", "spl", "noise_aware", "terms")
FULL = "motionrft"


@dataclass(frozen=True)
class CompareRecipe:
    """What is compared, and on what budget."""

    methods: tuple[str, ...] = ("easytune", "refl-10", "draft-10", "draft-50", "alignprop", "drtune")
    """Methods by name (`finetune.strategies.names`), all on the semantic reward. "motionrft" is EasyTune with the
    configuration's whole reward and curriculum; "easytune" trains the last steps. The first method sets the budget."""
    ablate: tuple[str, ...] = ()
    """Parts of "motionrft" to switch one at a time: reward, curriculum, spl, noise_aware, terms."""
    without_spl: str = ""
    """Model folder of the reward's backbone before self-refinement; `spl` needs it."""
    updates: int = 0
    """Optimiser steps of every method; 0 = those that the first method makes in `finetune.batches`."""
    seconds: float = 0.0
    """Training seconds of every method; 0 = what the first method took for its updates, seed by seed."""
    rates: dict[str, float] = field(default_factory=dict)
    """Method -> learning rate, for methods that need another one than `finetune.optim.lr`."""
    seeds: int = 3
    """Fine-tuning seeds per method; intervals are over these."""
    split: str = "val"
    """Where models are scored; `test` once, after every choice is made."""
    probes: int = 10
    """Looks at the reward of held-out prompts per method, for the curves of reward over time."""
    probe_clips: int = 64
    """Held-out prompts of a look."""
    cost_rollouts: int = 3
    """Timed rollouts per method; a first one is not counted."""
    cost_steps: tuple[int, ...] = (10, 25, 50, 100)
    """Numbers of denoising steps at which activation memory is measured."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        wrong = [name for name in self.ablate if name not in ABLATIONS]
        rules = [
            (bool(self.methods or self.ablate), "methods and ablate are both empty"),
            (not wrong, f"ablate names {wrong}; known: {', '.join(ABLATIONS)}"),
            ("spl" not in self.ablate or bool(self.without_spl), "ablate=spl needs without_spl, a backbone's folder"),
            (self.updates >= 0 and self.seconds >= 0, "updates and seconds must not be negative"),
            (self.split in ("val", "test"), f"split must be val or test, got {self.split!r}"),
            *((getattr(self, n) >= 1, f"{n} must be at least 1") for n in ("seeds", "probe_clips", "cost_rollouts")),
            (self.probes >= 2, f"probes must be at least 2, got {self.probes}"),
            (all(rate > 0 for rate in self.rates.values()), "rates must be positive"),
        ]
        problems = [text for holds, text in rules if not holds]
        for name in (*self.methods, *self.rates):
            try:
                if name not in (FULL, "base"):
                    strategy_named(name, EasyTune())
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("compare: " + "; ".join(problems))


@dataclass(frozen=True)
class Entry:
    """One line of the tables: a way of fine-tuning."""

    name: str
    """Plain folder name."""
    label: str
    recipe: FinetuneRecipe
    reward: RewardFolders
    note: str = ""


def entries(compare: CompareRecipe, recipe: FinetuneRecipe, reward: RewardFolders) -> list[Entry]:
    """Return what is compared, in the order of the tables.

    Args:
        compare: methods and ablations.
        recipe: the configured fine-tuning; its strategy's own settings are those of "easytune" where it is one.
        reward: the configured reward.

    Raises:
        ConfigError: two entries of one name, or an ablation of what the configuration does not have.
    """
    own = recipe.strategy if isinstance(recipe.strategy, EasyTune) else EasyTune()
    full = replace(recipe, strategy=replace(own, timesteps="curriculum"))
    single = replace(recipe, weights=single_task(recipe.weights))
    last = replace(own, timesteps="last") if own.timesteps == "curriculum" else own
    found = []
    for name in compare.methods:
        if name == FULL:
            found.append(Entry(FULL, "MotionRFT", full, reward, f"weights {dict(recipe.weights)}, curriculum"))
            continue
        method = replace(single, strategy=strategy_named(name, last))
        found.append(Entry(name, name, _at_rate(method, compare.rates.get(name)), reward))
    if compare.ablate and FULL not in compare.methods:
        found.append(Entry(FULL, "MotionRFT", full, reward))
    found += [ablated for what in compare.ablate for ablated in _ablations(what, full, reward, compare)]
    names = [entry.name for entry in found]
    if len(set(names)) != len(names):
        raise ConfigError(explain("every method once", str(names), "compare.methods", "Remove the repetition."))
    return found


def single_task(weights: dict[str, float]) -> dict[str, float]:
    """Return weights whose only learned term is the semantic one; rule-based terms keep theirs."""
    return {
        name: (weight if name == "semantic" or name not in LEARNED_TERMS else 0.0) for name, weight in weights.items()
    }


def _at_rate(recipe: FinetuneRecipe, rate: float | None) -> FinetuneRecipe:
    return recipe if rate is None else replace(recipe, optim=replace(recipe.optim, lr=rate))


def _ablations(what: str, full: FinetuneRecipe, reward: RewardFolders, compare: CompareRecipe) -> list[Entry]:
    """Return "motionrft" with one thing switched."""
    own = full.strategy
    assert isinstance(own, EasyTune)
    if what == "reward":
        return [Entry("no_reward", "semantic reward only", replace(full, weights=single_task(full.weights)), reward)]
    if what == "curriculum":
        return [Entry("no_curriculum", "no curriculum", replace(full, strategy=replace(own, timesteps="last")), reward)]
    if what == "spl":
        before = replace(reward, backbone=compare.without_spl)
        note = "adapters belong to one backbone: this row has the semantic term of the backbone before refinement"
        bare = replace(before, preference="", authenticity="")
        return [Entry("no_spl", "reward without SPL", replace(full, weights=single_task(full.weights)), bare, note)]
    if what == "noise_aware":
        other = "x_prev" if own.score == "x0_hat" else "x0_hat"
        label = {"x_prev": "reward reads the noisy state", "x0_hat": "reward reads the clean estimate"}[other]
        return [Entry(f"reads_{other}", label, replace(full, strategy=replace(own, score=other)), reward)]
    driving = [name for name, weight in full.weights.items() if weight]
    if len(driving) < 2:
        raise ConfigError(
            explain("at least two reward terms", str(driving), "compare.ablate=terms", "Give more of them weights.")
        )
    return [
        Entry(f"no_{name}", f"without {name}", replace(full, weights={**full.weights, name: 0.0}), reward)
        for name in driving
    ]


@dataclass(frozen=True)
class Comparison:
    """Folders and stages of a comparison, all decided before anything starts."""

    compare: CompareRecipe
    entries: Sequence[Entry]
    dataset: str
    generator: str
    evaluators: dict[str, str]
    evaluate: EvaluateRecipe
    seed: int
    run_dir: Path

    @property
    def updates(self) -> int:
        """Optimiser steps of the equal-updates budget."""
        return self.compare.updates or self.entries[0].recipe.updates

    def stage_name(self, entry: Entry, seed: int) -> str:
        """Folder of one training."""
        return f"{entry.name}_{seed}"

    def stages(self) -> list[Stage]:
        """Return every training, then the cost of each method."""
        found = []
        for seed in range(self.compare.seeds):
            for entry in self.entries:
                found.append(
                    Stage(
                        self.stage_name(entry, seed),
                        "motionrft.training.recipes.finetune:run",
                        to_plain(self._job(entry, seed)),
                    )
                )
        for entry in self.entries:
            spent = (self.compare.cost_rollouts, self.compare.cost_steps)
            cost = CostJob(self.dataset, self.generator, entry.reward, self.seed, entry.recipe, *spent)
            found.append(Stage(f"cost_{entry.name}", "motionrft.training.recipes.cost:run", to_plain(cost)))
        return found

    def _job(self, entry: Entry, seed: int) -> FinetuneJob:
        batches = batches_for(entry.recipe.strategy, entry.recipe.num_steps, self.updates)
        first, seconds = entry is self.entries[0], self.compare.seconds
        recipe = replace(
            entry.recipe,
            batches=batches,
            # one rate for both budgets: a schedule would end at one of them only
            optim=replace(entry.recipe.optim, schedule="constant"),
            log_every=1,
            validate_every=0,
            probe_every=max(1, batches // self.compare.probes),
            probe_clips=self.compare.probe_clips,
            snapshot_updates=(self.updates,),
            snapshot_seconds=(seconds,) if seconds else (),
            until_snapshots=True,
        )
        as_long_as = "" if seconds or first else str(self.run_dir / self.stage_name(self.entries[0], seed))
        return FinetuneJob(
            self.dataset,
            self.generator,
            entry.reward,
            self.seed + seed,
            recipe,
            self.evaluators,
            validation_recipe(self.evaluate),
            as_long_as=as_long_as,
        )

    def kept(self, results: Mapping[str, Mapping[str, Any]], entry: Entry, budget: str) -> list[tuple[str, Any]]:
        """Return (model folder, position) at the end of a budget, seed by seed; nothing for a budget without models."""
        found = []
        for seed in range(self.compare.seeds):
            stage = self.stage_name(entry, seed)
            names = [n for n in results[stage]["snapshots"] if n.startswith(f"{budget}_")]
            found += [(str(self.run_dir / stage / "snapshots" / n), results[stage]["snapshots"][n]) for n in names]
        return found

    def rows(self, results: Mapping[str, Mapping[str, Any]]) -> list[RowSpec]:
        """What the evaluation scores: real clips, the base, every entry at either budget.

        Args:
            results: of the stages.
        """
        found = [RowSpec(REAL, "real motion"), RowSpec(BASE, "base", (self.generator,), seeds=self.compare.seeds)]
        for budget in BUDGETS:
            for entry in self.entries:
                models = tuple(model for model, _ in self.kept(results, entry, budget))
                if models:  # the first method's seconds are the budget: its two models are one
                    found.append(RowSpec(f"{entry.name}@{budget}", entry.label, models, entry.note))
        return found


def batches_for(strategy: Strategy, num_steps: int, updates: int) -> int:
    """Return the fewest batches in which a method makes so many optimiser steps."""
    return math.ceil(updates / strategy.updates_per_rollout(num_steps))
