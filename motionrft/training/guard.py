"""Reward hacking and overfitting, seen in held-out metrics: an alarm, early stopping, and which model is the best.

Everything is a function of the list of looks at the validation split, which is the whole state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from motionrft.core.errors import ConfigError

ON_ALARM = ("warn", "stop")
KEEP = ("last", "best")


@dataclass(frozen=True)
class GuardConfig:
    """When validation speaks up, and what follows."""

    on_alarm: str = "warn"
    """What an alarm does: warn | stop. It is logged as val/alarm and told in the stage's result either way."""
    patience: int = 2
    """Validations in a row that must look like reward hacking."""
    sigmas: float = 1.5
    """Standard errors by which R-precision must have fallen. At 1.5 and patience 2, ten validations of a constant
    R-precision of 0.55 on 200 clips raise a false alarm in 8 % of runs if half of their noise is shared, and a fall of
    0.1 is found in 87 %."""
    tolerance: float = 0.15
    """Share by which FID or jerk must have risen."""
    early_stop_patience: int = 0
    """End after this many validations in a row without a better val/score; 0 = never."""
    keep: str = "last"
    """Which weights become FOLDER/model: last | best (by val/score). The others, if they differ, go to
    FOLDER/model_best or FOLDER/model_last."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        rules = [
            (self.on_alarm in ON_ALARM, f"on_alarm must be one of {ON_ALARM}, got {self.on_alarm!r}"),
            (self.keep in KEEP, f"keep must be one of {KEEP}, got {self.keep!r}"),
            (self.patience >= 1, f"patience must be at least 1, got {self.patience}"),
            *(
                (getattr(self, n) >= 0, f"{n} must not be negative, got {getattr(self, n)}")
                for n in ("sigmas", "tolerance", "early_stop_patience")
            ),
        ]
        problems = [text for holds, text in rules if not holds]
        if problems:
            raise ConfigError("guard: " + "; ".join(problems))

    @property
    def acts(self) -> bool:
        """Whether anything but a warning follows from validation."""
        return self.on_alarm == "stop" or self.early_stop_patience > 0 or self.keep == "best"


@dataclass(frozen=True)
class Look:
    """One look at held-out clips."""

    batches: float
    """Batches done."""
    reward: float
    """Mean reward of held-out prompts, the quantity that is maximised."""
    reward_error: float
    """Its standard error over prompts."""
    r_precision_top1: float
    """Higher is better."""
    fid: float
    """Lower is better."""
    jerk: float
    """Lower is better."""
    score: float
    """What models are chosen by; higher is better."""
    clips: float
    """Clips behind the R-precision."""


class Guard:
    """Watches the looks; a `training.loop.Stateful`.

    The reference of an alarm is the look with the best score so far, the model before training included. A look is
    suspicious if since then the reward has risen by more than the standard error of the difference of two means,
    while a held-out metric got worse by more than its tolerance: R@1 by `sigmas` standard errors of the difference of
    two proportions, FID or jerk by a share `tolerance` of what they were. Both errors are those of independent
    samples although clips and noise are the same at every look: cautious. `patience` suspicious looks in a row are an
    alarm, which lasts until a look that is not suspicious.

    Attributes:
        looks: the model before training first.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.looks: list[Look] = []

    def add(self, look: Look) -> None:
        """Take a look into account."""
        self.looks.append(look)

    @property
    def best(self) -> Look | None:
        """The trained model with the best score, the earliest of equals."""
        return max(self.looks[1:], key=lambda look: look.score, default=None)

    def suspicion(self, index: int) -> str:
        """Return what a look shows of reward hacking, with numbers; "" = nothing."""
        if index == 0:
            return ""
        then, now = max(self.looks[:index], key=lambda look: look.score), self.looks[index]
        noise = math.hypot(then.reward_error, now.reward_error)
        if not now.reward - then.reward > noise:
            return ""
        p, q = then.r_precision_top1, now.r_precision_top1
        error = self.config.sigmas * math.sqrt((p * (1 - p) + q * (1 - q)) / max(now.clips, 1.0))
        found = [f"R@1 {p:.3f} -> {q:.3f} (tolerance {error:.3f})"] if p - q > error else []
        for name in ("fid", "jerk"):
            old, new = getattr(then, name), getattr(now, name)
            if new > old * (1 + self.config.tolerance):
                found.append(f"{name} {old:.4g} -> {new:.4g} (tolerance {self.config.tolerance:.0%})")
        if not found:
            return ""
        rise = f"reward {then.reward:.4g} -> {now.reward:.4g} (noise {noise:.2g})"
        return f"since batch {then.batches:.0f}: {rise}, while {', '.join(found)}"

    def alarm(self, index: int) -> str:
        """Return what raises the alarm at a look, "" = there is none."""
        recent = [self.suspicion(i) for i in range(max(index - self.config.patience + 1, 0), index + 1)]
        return recent[-1] if len(recent) == self.config.patience and all(recent) else ""

    def alarms(self) -> dict[str, str]:
        """Return {batches done: what raised the alarm} of every look with one."""
        raised = ((f"{look.batches:.0f}", self.alarm(i)) for i, look in enumerate(self.looks))
        return {batches: text for batches, text in raised if text}

    def stop_reason(self) -> str:
        """Return why the last look ends the run, "" = it does not."""
        if self.best is None:
            return ""
        if self.config.on_alarm == "stop" and (text := self.alarm(len(self.looks) - 1)):
            return f"reward hacking {text}"
        since = len(self.looks) - 1 - self.looks.index(self.best)
        if 0 < self.config.early_stop_patience <= since:
            return f"no better val/score than {self.best.score:.4g} of batch {self.best.batches:.0f} in {since} looks"
        return ""

    def export_state(self) -> dict[str, Tensor]:
        """Return the looks, one per row."""
        return {"looks": torch.tensor([astuple(look) for look in self.looks], dtype=torch.float64).view(-1, 8)}

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore them."""
        self.looks = [Look(*row) for row in state["looks"].tolist()]
