"""Captions' features to motions: clean sampling without gradient. Letters: B clips, T frames, D features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from motionrft.core.protocols import MotionGenerator
from motionrft.core.types import Condition
from motionrft.diffusion.denoise import initial_noise, keyed_noise, sample


@torch.no_grad()
def generate(
    generator: MotionGenerator,
    network: Callable[..., Tensor] | None,
    condition: Condition,
    lengths_B: Tensor,
    keys_B: Tensor,
    num_steps: int,
    seed: int,
    batch_size: int = 64,
) -> Tensor:
    """Return physical motions (B, T, D) with T the largest length, zeros beyond each length.

    Noise depends on (seed, sample key, step) only, so splitting, ordering or padding the clips changes nothing but
    rounding; clips of similar length therefore share a batch, which saves work on padding. The network runs in
    eval mode and is left in the mode it was in.

    Args:
        generator: schedule, guidance, decoding.
        network: module or engine to run; None = the generator's own.
        condition: B rows.
        lengths_B: int64 frames wanted, >= 1.
        keys_B: int64 sample keys.
        num_steps: denoising steps S.
        seed: of the noise.
        batch_size: clips per network call.
    """
    network = generator.network if network is None else network
    module = network if isinstance(network, nn.Module) else getattr(network, "module", generator.network)
    table = generator.solver(num_steps)
    frames = int(lengths_B.max())
    order = torch.argsort(lengths_B, stable=True)
    motions = []
    was_training = module.training
    module.eval()
    try:
        for start in range(0, len(lengths_B), batch_size):
            rows = order[start : start + batch_size]
            text, lengths, keys = condition.index(rows), lengths_B[rows], keys_B[rows]
            shape = generator.state_shape(int(lengths.max()))

            def predict(x: Tensor, t: Tensor, text: Condition = text, lengths: Tensor = lengths) -> Tensor:
                return generator.predict(network, x, t, text, lengths)

            noise = keyed_noise(keys, shape, seed)
            state = sample(table, predict, initial_noise(keys, shape, seed), noise)
            motion = generator.decode(state, lengths)[:, :frames]
            motions.append(torch.nn.functional.pad(motion, (0, 0, 0, frames - motion.shape[1])))
    finally:
        module.train(was_training)
    return torch.cat(motions)[torch.argsort(order)]
