"""A search space: one question, as dotted configuration fields with distributions, a metric and a budget."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tune_spaces
from motionrft.core.errors import ConfigError
from motionrft.runtime.tune_search import SearchConfig

_NOT_SPACES = {"space"}

VALIDATION_SCORE = SearchConfig(metric="val/score", mode="max", num_samples=8, grace_reports=1, max_reports=4)
"""The usual budget, and the usual metric: R-precision on validation minus what FID and jerk got worse
(`recipes.watch.validation_score`). Never the training reward, which every trial can raise by hacking it."""

LEARNING_RATE: Mapping[str, Any] = {"finetune.optim.lr": {"around": [0.3, 3.0]}}
"""A decade around the configuration's own rate: 3e-6 to 3e-5 for the paper's 1e-5, 2.4e-5 to 2.4e-4 for the small model
of the quickstart."""


@dataclass(frozen=True)
class SearchSpace:
    """What is varied and what is maximised."""

    question: str
    """One sentence."""
    fields: Mapping[str, Any]
    """Dotted field -> distribution: {uniform: [low, high]}, {loguniform: ...}, {choice: [...]}, {grid: [...]} and
    {around: [low, high]}, which is log-uniform between these multiples of what the configuration has; or a constant.
    "finetune.strategy" names the method; a configuration that already has it keeps its other fields."""
    search: SearchConfig = VALIDATION_SCORE
    """Metric, budget, scheduler."""

    def resolved(self, config: Mapping[str, Any], changed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the fields with every `around` made a range.

        Args:
            config: plain configuration that the search starts from.
            changed: dotted field -> distribution or constant, the user's own; they win.

        Raises:
            ConfigError: `around` a field that is no positive number.
        """
        return {name: _resolve(name, spec, config) for name, spec in {**self.fields, **(changed or {})}.items()}


def _resolve(name: str, spec: Any, config: Mapping[str, Any]) -> Any:
    if not isinstance(spec, Mapping) or "around" not in spec:
        return spec
    value: Any = config
    for key in name.split("."):
        value = value.get("init_args", value).get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"{name}: around needs a positive number in the configuration, which has {value!r}")
    low, high = spec["around"]
    return {"loguniform": [low * value, high * value]}


def space_names() -> list[str]:
    """Return the spaces that ship with the project, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(tune_spaces.__path__) if m.name not in _NOT_SPACES)


def load_space(name: str) -> SearchSpace:
    """Return the space `SPACE` of tune_spaces/NAME.py.

    Raises:
        ConfigError: unknown name.
    """
    if name not in space_names():
        raise ConfigError(f"unknown search space {name!r}; known: {', '.join(space_names())}")
    found = importlib.import_module(f"tune_spaces.{name}").SPACE
    assert isinstance(found, SearchSpace)
    return found
