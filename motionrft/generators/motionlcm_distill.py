"""Latent consistency distillation: a student learns to give the same clean latent along its teacher's guided path.

Letters: B batch, N diffusion steps (latent tokens in shapes), d features per latent token, K points of the grid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from motionrft.core.rng import keyed_normal, keyed_uniform
from motionrft.core.types import MotionBatch
from motionrft.diffusion.guidance import double_rows, guide_doubled
from motionrft.diffusion.prediction import add_noise, x0_coefficients
from motionrft.diffusion.solvers import consistency_coefficients
from motionrft.generators.mld import MLDGenerator
from motionrft.generators.mld_network import guidance_embedding


def grid_times(train_steps: int, points: int) -> Tensor:
    """Return the K diffusion steps (j + 1) floor(N / K) - 1 of the grid, cleanest first, (K,) int64."""
    return (torch.arange(points) + 1) * (train_steps // points) - 1


class Distillation:
    """Objective of the student, and the slowly moving target network it is compared with.

    One example: noise a latent to grid time t_j; the student's consistency output there is compared with the target
    network's one DDIM step of the guided teacher earlier, at t_(j-1) (time 0 for j = 0). Teacher and target are in
    eval mode. Every draw depends on (seed, step, sample key) only.

    Args:
        student: the network that learns; the target starts as its copy.
        teacher: guided noise prediction, latent space, empty caption, schedule.
        points: K.
        huber: width of the pseudo-Huber distance.
        decay: share of itself that the target keeps.
        guidance: range of w = scale - 1.
        guidance_dim: size of its embedding.

    Source: latent consistency models; MotionLCM. Differs: teacher and target run without dropout.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: MLDGenerator,
        *,
        points: int,
        huber: float,
        decay: float,
        guidance: tuple[float, float],
        guidance_dim: int,
    ) -> None:
        self.teacher, self.huber, self.decay = teacher, huber, decay
        self.guidance, self.guidance_dim = guidance, guidance_dim
        teacher.network.eval()
        device = teacher.latents.scale.device
        self.target = copy.deepcopy(student).eval().requires_grad_(False).to(device)
        self.alpha_bar = teacher.alpha_bar.to(device)
        self.grid = grid_times(teacher.spec.train_steps, points).to(device)

    def loss(
        self, network: Callable[..., Tensor], batch: MotionBatch, step: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses (B,) and their detached mean for the log."""
        draw = (seed, "distill", step)
        z = self.teacher.sampled_states(batch, *draw)
        points, (low, high) = len(self.grid), self.guidance
        index_B = (keyed_uniform(batch.keys_B, "t", *draw) * points).long().clamp(max=points - 1)
        w_B = low + (high - low) * keyed_uniform(batch.keys_B, "guidance", *draw)
        noise = keyed_normal(batch.keys_B, tuple(z.shape[1:]), "noise", *draw)
        loss_B = self.distance(network, z, noise, index_B, w_B, batch.prompt.pooled_BD)
        return loss_B, {"loss/consistency": loss_B.detach().mean()}

    def distance(
        self, network: Callable[..., Tensor], z: Tensor, noise: Tensor, index_B: Tensor, w_B: Tensor, text_BC: Tensor
    ) -> Tensor:
        """Return the pseudo-Huber distance (B,) of student and target.

        Args:
            network: the student or the engine around it.
            z: clean latents (B, N, d).
            noise: like z.
            index_B: grid points j.
            w_B: guidance scale minus 1.
            text_BC: sentence vectors.
        """
        start_B, end_B = self.times(index_B)
        x_t = add_noise(z, noise, self.alpha_bar[start_B])
        found = self.consistency(network, x_t, start_B, w_B, text_BC)
        with torch.no_grad():
            x_end = self.solve(x_t, start_B, end_B, w_B, text_BC)
            wanted = self.consistency(self.target, x_end, end_B, w_B, text_BC)
        return (((found - wanted).square() + self.huber**2).sqrt() - self.huber).mean((1, 2))

    def times(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the grid times of points j and those one point cleaner, 0 below the first."""
        start_B = self.grid[index_B]
        return start_B, (start_B - self.grid[0] - 1).clamp(min=0)

    def consistency(
        self, network: Callable[..., Tensor], x: Tensor, t_B: Tensor, w_B: Tensor, text_BC: Tensor
    ) -> Tensor:
        """Return c_skip x + c_out x0_hat (B, N, d); x itself at time 0."""
        eps = network(x, t_B, text_BC, guidance_embedding(w_B, self.guidance_dim))
        c_skip, c_out = (_rows(c_B, x) for c_B in consistency_coefficients(t_B))
        return c_skip * x + c_out * self._x0(x, eps, t_B)

    def solve(self, x: Tensor, start_B: Tensor, end_B: Tensor, w_B: Tensor, text_BC: Tensor) -> Tensor:
        """Return the teacher's guided DDIM step from the start to the end times, (B, N, d)."""
        null_BC = self.teacher.latents.null.expand_as(text_BC)
        out = self.teacher.network(double_rows(x), double_rows(start_B), torch.cat([text_BC, null_BC]))
        eps = guide_doubled(out, _rows(1.0 + w_B, x))
        return add_noise(self._x0(x, eps, start_B), eps, self.alpha_bar[end_B])

    def _x0(self, x: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        p_B, q_B = x0_coefficients(self.alpha_bar[t_B], "eps")
        return _rows(p_B, x) * x + _rows(q_B, x) * eps

    @torch.no_grad()
    def after_step(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Move the target network towards the student's whole tensors."""
        del done
        for name, value in self.target.named_parameters():
            value.lerp_(tensors[name].to(value), 1.0 - self.decay)

    def export_state(self) -> dict[str, Tensor]:
        """Return the target network's tensors on the CPU."""
        return {name: t.detach().cpu().clone() for name, t in self.target.state_dict().items()}

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `export_state`."""
        self.target.load_state_dict(dict(state), strict=True)


def _rows(value_B: Tensor, like: Tensor) -> Tensor:
    """Return (B, 1, 1) in the dtype of `like`."""
    return value_B.to(like.dtype)[:, None, None]
