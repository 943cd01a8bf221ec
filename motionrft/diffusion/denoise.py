"""THE denoising loop. Sampling, evaluation and every fine-tuning strategy run these lines; only the actions differ.

Letters: B batch, S denoising steps. Step 0 is the noisiest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from motionrft.core.protocols import SolverTable
from motionrft.core.rng import keyed_normal
from motionrft.core.types import StepOutput

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x, model time as a 0-dim tensor) -> guided network output, shaped like x."""

Noise = Callable[[int], Tensor]
"""step -> standard normal noise shaped like x."""

SCORES = ("none", "x0_hat", "x_prev")


@dataclass(frozen=True)
class StepAction:
    """What happens at one denoising step. The default is plain sampling."""

    grad: bool = False
    """Run the network with gradient."""
    cut_input: bool = True
    """The network sees the state without its history."""
    cut_after: bool = True
    """Neither this step's solver nor the next step sees the state's history."""
    score: str = "none"
    """What the reward reads: "none", "x0_hat" (one-step clean estimate) or "x_prev" (the new state)."""
    update: bool = False
    """The caller takes an optimiser step after this one."""
    weight: float = 1.0
    """Share of this step's loss in its update."""
    stop: bool = False
    """Nothing after this step is needed."""

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {self.score!r}")


SAMPLE = StepAction()


def denoise(
    table: SolverTable,
    actions: Sequence[StepAction],
    predict: Predict,
    x_T: Tensor,
    noise: Noise | None = None,
    skip_gains: tuple[Tensor, Tensor] | None = None,
) -> Iterator[StepOutput]:
    """Yield one `StepOutput` per action, noisiest first; between two yields the caller may score and update.

    A step's x_prev is computed before the caller's update, the next step's output after it. Steps without `grad` run
    the network under `no_grad`. The loop ends after the last action or one that says `stop`.

    Args:
        table: the sampler, S rows.
        actions: at most S, for steps 0, 1, ...
        predict: guided network output.
        x_T: initial noise (B, ...).
        noise: fresh noise of a step; needed where the table's c is not 0.
        skip_gains: derivatives of x_prev and x0_hat by x to use instead of a and p wherever an action cuts the input
            but not the chain (`solvers.skip_gains`); values are not changed.

    Raises:
        ValueError: more actions than steps, or a stochastic sampler without noise.
    """
    if len(actions) > len(table):
        raise ValueError(f"{len(actions)} actions for {len(table)} denoising steps")
    if noise is None and bool((table.c[: len(actions)] != 0).any()):
        raise ValueError("this sampler adds noise at some step; pass noise")
    gains = tuple(g.tolist() for g in skip_gains) if skip_gains is not None else None
    times = table.model_time.to(x_T.device)
    x = x_T
    for i, action in enumerate(actions):
        x_in = x.detach() if action.cut_input else x
        with nullcontext() if action.grad else torch.no_grad():
            out = predict(x_in, times[i])
        if gains is not None and action.cut_input and not action.cut_after:
            history = x - x.detach()  # zero in value; carries the chain's gradient
            mean, x0_hat = solver_step(table, i, x.detach(), out, None)
            mean, x0_hat = mean + gains[0][i] * history, x0_hat + gains[1][i] * history
            del history
        else:
            mean, x0_hat = solver_step(table, i, x.detach() if action.cut_after else x, out, None)
        x_prev = with_noise(table, i, mean, noise)
        # The caller sees x_prev before the cut: the last step's gradient reaches it through `out`.
        read = read_at(table, i, action.score)
        yield StepOutput(i, x_in, x_prev, x0_hat, action.score, action.update, *read, mean=mean)
        if action.stop:
            return
        x = x_prev.detach() if action.cut_after else x_prev
        # A suspended generator must not keep the step's graph alive while the next network call runs.
        del x_in, out, mean, x_prev, x0_hat


def solver_step(table: SolverTable, i: int, x: Tensor, out: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
    """Return (x_prev, x0_hat) of step i for state x (B, ...) and network output `out`; `noise` as in `denoise`.

    Without noise, x_prev is the mean of the step.
    """
    a, b, p, q = (float(column[i]) for column in (table.a, table.b, table.p, table.q))
    return with_noise(table, i, _affine(a, x, b, out), noise), _affine(p, x, q, out)


def with_noise(table: SolverTable, i: int, mean: Tensor, noise: Noise | None) -> Tensor:
    """Return a step's mean plus its fresh noise, where the sampler has one."""
    c = float(table.c[i])
    return mean if c == 0 or noise is None else mean + c * noise(i).to(mean.dtype)


def read_at(table: SolverTable, i: int, score: str) -> tuple[float, float]:
    """Return (noise level, scale) of what a reward reads after step i; see `StepOutput`."""
    if score != "x_prev":
        return 0.0, 1.0
    return float(table.noise_level[i + 1]), 1.0 if table.scale is None else float(table.scale[i + 1])


def noised(table: SolverTable, step: int, clean: Tensor, noise: Tensor) -> Tensor:
    """Return the state before `step` of a clean state: the sampler's own noise level, flows included."""
    level = float(table.noise_level[step])
    scale = 1.0 if table.scale is None else float(table.scale[step])
    return ((1.0 - level**2) ** 0.5 * clean + level * noise) / scale


def _affine(a: float, x: Tensor, b: float, out: Tensor) -> Tensor:
    """Return a x + b out, leaving out what is multiplied by zero or one."""
    scaled = out if b == 1.0 else b * out
    return scaled if a == 0.0 else a * x + scaled


@torch.no_grad()
def sample(table: SolverTable, predict: Predict, x_T: Tensor, noise: Noise | None = None) -> Tensor:
    """Return the final state of plain sampling: the same loop with nothing to learn from."""
    x = x_T
    for step in denoise(table, [SAMPLE] * len(table), predict, x_T, noise):
        x = step.x_prev
    return x


def initial_noise(keys_B: Tensor, shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """Return x_T (B, *shape), float32, keyed by sample. Frames come first in `shape`, so padding only extends it."""
    return keyed_normal(keys_B, shape, "x_T", *parts)


def keyed_noise(keys_B: Tensor, shape: tuple[int, ...], *parts: int | str) -> Noise:
    """Return a noise source for `denoise` that depends on sample key, `parts` and step only."""
    return lambda step: keyed_normal(keys_B, shape, "step-noise", *parts, step)
