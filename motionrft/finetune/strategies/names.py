"""Methods by the short names that comparisons and their tables use: "easytune", "refl-10", "draft-50"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from motionrft.core.errors import ConfigError, explain
from motionrft.finetune.strategies import STRATEGIES, AlignProp, DRaFT, EasyTune, ReFL
from motionrft.finetune.strategy import Strategy

_NUMBERED: Mapping[str, Callable[[EasyTune, int], Strategy]] = {
    "easytune": lambda own, k: replace(own, window=k),
    "refl": lambda own, k: ReFL(last_steps=k),
    "draft": lambda own, k: DRaFT(last_steps=k),
}
_VARIANTS: Mapping[str, Callable[[EasyTune], Strategy]] = {
    "easytune-chain": lambda own: replace(own, variant="chain"),
    "easytune-accumulate": lambda own: replace(own, variant="accumulate"),
    "easytune-replay": lambda own: replace(own, variant="replay"),
    "easytune-last": lambda own: replace(own, timesteps="last"),
    "easytune-uniform": lambda own: replace(own, timesteps="uniform"),
    "easytune-perception": lambda own: replace(own, score="x_prev"),
    "alignprop-uniform": lambda own: AlignProp(mode="uniform"),
    "alignprop-bernoulli": lambda own: AlignProp(mode="bernoulli"),
}


def known_names() -> list[str]:
    """Return every name, K standing for a number."""
    plain = [name.replace("_", "-") for name in STRATEGIES]
    return [*plain, *(f"{name}-K" for name in _NUMBERED), *_VARIANTS]


def strategy_named(name: str, easytune: EasyTune) -> Strategy:
    """Return the method of a name with its own defaults; EasyTune's are those of `easytune`.

    "refl-K" draws its stop from the last K steps, "draft-K" goes through the last K, "easytune-K" has a window of K.

    Raises:
        ConfigError: unknown name.
    """
    if name in _VARIANTS:
        return _VARIANTS[name](easytune)
    numbered = re.fullmatch(r"([a-z]+)-([1-9]\d*)", name)
    if numbered and numbered[1] in _NUMBERED:
        return _NUMBERED[numbered[1]](easytune, int(numbered[2]))
    if name == "easytune":
        return easytune
    found = STRATEGIES.get(name.replace("-", "_"))
    if found is None:
        raise ConfigError(explain(f"one of {', '.join(known_names())}", repr(name), "methods", "Correct the name."))
    return found()
