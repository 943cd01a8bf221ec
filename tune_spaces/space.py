"""A search space: one question, as dotted configuration fields with distributions, a metric and a budget."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tune_spaces
from motionrft.core.errors import ConfigError
from motionrft.runtime.tune import SearchConfig

_NOT_SPACES = {"space"}


@dataclass(frozen=True)
class SearchSpace:
    """What is varied and what is maximised."""

    question: str
    """One sentence."""
    fields: Mapping[str, Any]
    """Dotted field -> distribution: {uniform: [low, high]}, {loguniform: ...}, {choice: [...]}, {grid: [...]}."""
    search: SearchConfig
    """Metric, budget, scheduler."""


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
