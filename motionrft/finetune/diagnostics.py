"""What a fine-tuning gradient meets on its way through the sampler, measured on any generator: Figures 4 to 6.

Letters: B clips, S denoising steps, E reward embedding. x_0 is the noise, x_S the sample, J_i = d x_{i+1} / d x_i.
One rollout without gradient is kept as its states; everything else looks at one step at a time, so memory holds one
step's graph whatever S is. Nothing is trained, and padding and batch mates change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from motionrft.core.protocols import MotionGenerator, SolverTable
from motionrft.core.rng import keyed_normal
from motionrft.core.types import MotionBatch, StepOutput
from motionrft.diffusion.denoise import SAMPLE, Noise, Predict, StepAction, denoise, initial_noise, keyed_noise

Embed = Callable[[Tensor, float], Tensor]
"""(physical motion (B, T, D), noise level) -> reward embeddings (B, E)."""

Score = Callable[[Tensor, float], Tensor]
"""(physical motion (B, T, D), noise level) -> reward to maximise (B,), differentiable."""

_TINY = 1e-30  # keeps logarithms and quotients finite; far below any gradient float32 resolves


@dataclass(frozen=True)
class SamplingPath:
    """One rollout as plain sampling walks it. `states` are x_0 .. x_S, `x0_hats` the clean estimates of the S steps."""

    generator: MotionGenerator
    batch: MotionBatch
    table: SolverTable
    noise: Noise
    states: tuple[Tensor, ...]  # S + 1 of (B, ...)
    x0_hats: tuple[Tensor, ...]  # S of (B, ...)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def dim_B(self) -> Tensor:
        """State entries of each clip, (B,): the side of its Jacobians."""
        start = self.states[0]
        return self.generator.state_mask(start, self.batch.lengths_B).expand_as(start).flatten(1).sum(1)

    def probe(self, seed: int, *parts: int | str) -> Tensor:
        """Return a random direction per clip, of length 1 and zero where the state is padding."""
        start = self.states[0]
        draw = keyed_normal(self.batch.keys_B, tuple(start.shape[1:]), "probe", seed, *parts).to(start.dtype)
        draw = torch.where(self.generator.state_mask(start, self.batch.lengths_B), draw, 0.0)
        return draw / _norm(draw).clamp(min=_TINY).view(-1, *[1] * (draw.dim() - 1))

    def step(self, index: int, x: Tensor) -> StepOutput:
        """Return step `index` from state x (B, ...), with gradient: the sampling loop on one row of its table."""
        live = StepAction(grad=True, cut_input=False, cut_after=False)
        predict = _predict(self.generator, self.batch)
        with _eval_mode(self.generator.network), torch.enable_grad():
            return next(denoise(_row(self.table, index), [live], predict, x, lambda _: self.noise(index)))

    def pull_back(self, index: int, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return J_index^T u for each u (B, ...): how a gradient at x_{index+1} reaches x_index."""
        x = self.states[index].detach().requires_grad_()
        x_next = self.step(index, x).x_prev
        last = len(cotangents) - 1
        return [torch.autograd.grad(x_next, x, u, retain_graph=k < last)[0] for k, u in enumerate(cotangents)]

    def decode(self, state: Tensor) -> Tensor:
        """Return the physical motion (B, T, D) of a state."""
        return self.generator.decode(state, self.batch.lengths_B)

    def reading(self, index: int) -> tuple[float, float]:
        """Return (factor, noise level) with which rewards read x_index."""
        scale = 1.0 if self.table.scale is None else float(self.table.scale[index])
        return scale, float(self.table.noise_level[index])


@torch.no_grad()
def sampling_path(generator: MotionGenerator, batch: MotionBatch, num_steps: int, seed: int) -> SamplingPath:
    """Return the states of plain sampling: the motion that `generate` makes of the same seed, and the way to it.

    Args:
        generator: of any family; its network runs in eval mode and is left in the mode it was in.
        batch: captions, lengths and keys.
        num_steps: denoising steps S.
        seed: of the noise.
    """
    shape = generator.state_shape(int(batch.lengths_B.max()))
    table, noise = generator.solver(num_steps), keyed_noise(batch.keys_B, shape, seed)
    states, clean = [initial_noise(batch.keys_B, shape, seed)], []
    with _eval_mode(generator.network):
        for output in denoise(table, [SAMPLE] * num_steps, _predict(generator, batch), states[0], noise):
            states.append(output.x_prev)
            clean.append(output.x0_hat)
    return SamplingPath(generator, batch, table, noise, tuple(states), tuple(clean))


@dataclass(frozen=True)
class JacobianNorms:
    """How much one step, and all steps after a state, stretch a random gradient: root mean square singular values.

    1 means that gradients pass unchanged, whatever the size of the state: ||J||_F = value * sqrt(dim).
    """

    step_SB: Tensor  # of J_i
    chain_SB: Tensor  # of J_{S-1} ... J_i: what of the sample's gradient reaches x_i
    dim_B: Tensor  # state entries of each clip

    @property
    def step_per_dim_SB(self) -> Tensor:
        """||J_i||_F / dim, which falls with the size of the state even where nothing is lost."""
        return self.step_SB / self.dim_B.sqrt()


def jacobian_norms(path: SamplingPath, probes: int = 4, seed: int = 0) -> JacobianNorms:
    """Return the norms of each step's Jacobian and of the product of those from it to the sample.

    For a direction v drawn uniformly from the unit sphere, E ||J^T v||^2 = ||J||_F^2 / dim. The steps' probes are
    fresh; those of the product start at the sample and walk back through every step, which is exact for each of them.

    Args:
        path: of the rollout.
        probes: directions per clip, >= 1; the estimate's variance falls as 1 / probes.
        seed: of the directions.

    Source: Eq. 18 (the coefficient that "tends to 0") and Fig. 4, 6.
    """
    if probes < 1:
        raise ValueError(f"probes must be >= 1, got {probes}")
    walking = [path.probe(seed, "chain", k) for k in range(probes)]
    step, chain = [], []
    for i in reversed(range(len(path))):
        pulled = path.pull_back(i, [*walking, *(path.probe(seed, "step", i, k) for k in range(probes))])
        walking, fresh = pulled[:probes], pulled[probes:]
        chain.append(_rms(walking))
        step.append(_rms(fresh))
    return JacobianNorms(torch.stack(step[::-1]), torch.stack(chain[::-1]), path.dim_B)


@dataclass(frozen=True)
class RewardGradients:
    """Norm of the reward's gradient at each step's network output, which is what reaches the parameters from there."""

    direct_SB: Tensor  # reward read at that step, state cut (Eq. 22, 24)
    chain_SB: Tensor  # reward of the sample through all later steps (Eq. 17, 18)
    chain_at_state_SB: Tensor  # ||dR(x_S) / dx_{i+1}||, the same without the sampler's coefficient
    cosine_SB: Tensor  # of the two directions; 1 = the cut changes the length only


def reward_gradients(path: SamplingPath, score: Score, scored: str = "x0_hat") -> RewardGradients:
    """Return what EasyTune's direct term and full backpropagation give each denoising step.

    With scored "x_prev" the two agree at the last step. Gradients are of each clip's own reward, not of the batch mean.

    Args:
        path: of the rollout.
        score: reward of a physical motion at a noise level.
        scored: what the direct term's reward reads, "x0_hat" or "x_prev".
    """
    if scored not in ("x0_hat", "x_prev"):
        raise ValueError(f"scored must be 'x0_hat' or 'x_prev', got {scored!r}")
    b, q = path.table.b.tolist(), path.table.q.tolist()
    walking = _gradient(path, score, path.states[-1], *path.reading(len(path)))
    direct, chain, at_state, cosine = [], [], [], []
    for i in reversed(range(len(path))):
        if scored == "x0_hat":
            own = q[i] * _gradient(path, score, path.x0_hats[i], 1.0, 0.0)
        else:
            own = b[i] * _gradient(path, score, path.states[i + 1], *path.reading(i + 1))
        whole = b[i] * walking
        direct.append(_norm(own))
        chain.append(_norm(whole))
        at_state.append(_norm(walking))
        cosine.append(_cosine(own, whole))
        (walking,) = path.pull_back(i, [walking])
    return RewardGradients(*(torch.stack(values[::-1]) for values in (direct, chain, at_state, cosine)))


def _gradient(path: SamplingPath, score: Score, state: Tensor, scale: float, level: float) -> Tensor:
    """Return d reward / d state, each clip's own; the reward reads the motion of scale * state."""
    state = state.detach().requires_grad_()
    return torch.autograd.grad(score(path.decode(scale * state), level).sum(), state)[0]


@torch.no_grad()
def noise_similarity(
    generator: MotionGenerator, batch: MotionBatch, x0: Tensor, num_steps: int, embed: Embed, seed: int = 0
) -> dict[str, Tensor]:
    """Return how like its clean state a noised state is, before each step and after the last, (S + 1, B) each.

    The state at level s is sqrt(1 - s^2) x0 + s eps, with one eps per clip at all levels; that is also how rewards
    read the states of flows. Cosines with the clean state: `labelled` of reward embeddings that are told the level,
    `unlabelled` of those told that it is clean, `features` of the decoded motion in physical units (mostly the mean
    pose, which noise leaves alone), `state` of the state itself.

    Args:
        generator: decodes, and says which levels its sampler visits.
        batch: lengths and keys.
        x0: clean states (B, ...): `generator.encode` of real motion, or a path's last states.
        num_steps: denoising steps S.
        embed: of the reward.
        seed: of the noise.

    Source: Fig. 5.
    """
    eps = keyed_normal(batch.keys_B, tuple(x0.shape[1:]), "similarity", seed).to(x0.dtype)
    valid = generator.state_mask(x0, batch.lengths_B)
    clean = generator.decode(x0, batch.lengths_B)
    z_clean = embed(clean, 0.0)
    found: dict[str, list[Tensor]] = {"labelled": [], "unlabelled": [], "features": [], "state": []}
    for level in generator.solver(num_steps).noise_level.tolist():
        state = (1.0 - level**2) ** 0.5 * x0 + level * eps
        motion = generator.decode(state, batch.lengths_B)
        found["labelled"].append(_cosine(embed(motion, level), z_clean))
        found["unlabelled"].append(_cosine(embed(motion, 0.0), z_clean))
        found["features"].append(_cosine(motion, clean))
        found["state"].append(_cosine(torch.where(valid, state, 0.0), torch.where(valid, x0, 0.0)))
    return {name: torch.stack(values) for name, values in found.items()}


@torch.no_grad()
def path_similarity(path: SamplingPath, embed: Embed) -> dict[str, Tensor]:
    """Return how like the finished sample each step's results are, (S, B) each.

    Cosines with the sample's reward embedding: `x0_hat` of the clean estimate's, `x_prev` of the new state's, told its
    noise level (the two inputs of Eq. 19); `features` of the clean estimate's motion with the sample's.
    """
    final = path.decode(path.states[-1])
    z_final = embed(final, 0.0)
    found: dict[str, list[Tensor]] = {"x0_hat": [], "x_prev": [], "features": []}
    for i, x0_hat in enumerate(path.x0_hats):
        motion = path.decode(x0_hat)
        scale, level = path.reading(i + 1)
        found["x0_hat"].append(_cosine(embed(motion, 0.0), z_final))
        found["x_prev"].append(_cosine(embed(path.decode(scale * path.states[i + 1]), level), z_final))
        found["features"].append(_cosine(motion, final))
    return {name: torch.stack(values) for name, values in found.items()}


def spread_rows(series: str, values_SB: Tensor, log: bool = False) -> list[dict[str, float | str]]:
    """Return one row per step for `report.charts.series_lines`: centre over clips, one standard deviation either way.

    Args:
        series: name of the line.
        values_SB: per step and clip.
        log: geometric mean and deviation, for norms; otherwise arithmetic, for cosines.
    """
    x_SB = values_SB.detach().double()
    x_SB = x_SB.clamp(min=_TINY).log() if log else x_SB
    mean_S, std_S = x_SB.mean(1), x_SB.std(1, unbiased=False)
    ends = [(v.exp() if log else v).tolist() for v in (mean_S, mean_S - std_S, mean_S + std_S)]
    return [
        {"series": series, "x": i, "value": value, "low": low, "high": high}
        for i, (value, low, high) in enumerate(zip(*ends))
    ]


def _row(table: SolverTable, index: int) -> SolverTable:
    """Return the table of one step."""
    row, levels = slice(index, index + 1), slice(index, index + 2)
    columns = {name: getattr(table, name)[row] for name in ("model_time", "a", "b", "c", "p", "q")}
    scale = None if table.scale is None else table.scale[levels]
    return SolverTable(**columns, noise_level=table.noise_level[levels], scale=scale)


def _predict(generator: MotionGenerator, batch: MotionBatch) -> Predict:
    return lambda x, t: generator.predict(generator.network, x, t, batch.prompt, batch.lengths_B)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _norm(x: Tensor) -> Tensor:
    """Return each clip's norm, (B,)."""
    return x.flatten(1).norm(dim=1)


def _rms(probes: Sequence[Tensor]) -> Tensor:
    """Return the root of each clip's mean squared norm over probes, (B,)."""
    return torch.stack([_norm(u).square() for u in probes]).mean(0).sqrt()


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return each clip's cosine, (B,); 0 where one is zero."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp(min=_TINY)).float()
