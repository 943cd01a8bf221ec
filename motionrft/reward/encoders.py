"""Motion and text towers: a sequence in, a diagonal Gaussian posterior (mu, logvar) over the shared latent out.

Letters: B batch, T frames, N tokens, L text tokens, D tower width, d latent, F features of the representation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionrft.core.errors import RepresentationError, explain
from motionrft.nn.embeddings import LearnedPositions, TimeEmbedding
from motionrft.nn.frames import stack_frames
from motionrft.nn.transformer import SkipEncoder
from motionrft.reward.config import MotionRewardConfig
from motionrft.reward.projections import Projection


class MotionTower(nn.Module):
    """Motion -> posterior. This module alone carries adapters, hence the attention sites.

    Sequence: [class token, optional time token, frame tokens]; learned positions are added by index, so a time token
    moves every frame by one. The posterior is read from the class token.

    Args:
        config: sizes.
        sites: build adapter sites; False for copies into which adapters are already folded.
    """

    def __init__(self, config: MotionRewardConfig, sites: bool = True) -> None:
        super().__init__()
        dim = config.unified_dim
        self.config = config
        self.proj = nn.ModuleDict(
            {
                name: Projection(
                    config.feature_dim(name) * config.frames_per_token,
                    config.proj_hidden,
                    dim,
                    config.proj_layers,
                    config.dropout,
                )
                for name in config.representations
            }
        )
        self.token = nn.Parameter(torch.randn(1, dim))
        self.positions = LearnedPositions(config.max_positions, dim)
        self.time = TimeEmbedding(dim)
        self.encoder = SkipEncoder(dim, config.num_layers, config.num_heads, config.ff_dim, config.dropout, sites)
        self.dist = nn.Linear(dim, 2 * config.latent_dim)

    def forward(
        self, motion_BTF: Tensor, lengths_B: Tensor, representation: str, t_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (mu, logvar), each (B, d), of normalised motion.

        Args:
            motion_BTF: normalised features; what stands beyond a length is not read.
            lengths_B: int64, 1 <= length <= T.
            representation: name of the representation.
            t_B: diffusion time of the motion, (B,) or 0-d; None leaves the time token out, which is not t = 0.
        """
        return self.encode(*self.project(motion_BTF, lengths_B, representation), t_B)

    def project(self, motion_BTF: Tensor, lengths_B: Tensor, representation: str) -> tuple[Tensor, Tensor]:
        """Return projected tokens (B, N, D) and their mask (B, N).

        Raises:
            RepresentationError: for a representation the tower does not read, or the wrong number of features.
        """
        if representation not in self.proj:
            raise RepresentationError(
                explain(f"one of {list(self.proj)}", repr(str(representation)), "motion tower", "Use a known one.")
            )
        features = self.config.feature_dim(representation)
        if motion_BTF.dim() != 3 or motion_BTF.shape[2] != features:
            raise RepresentationError(
                explain(
                    f"(B, T, {features}) for {representation!s} of {self.config.num_joints} joints",
                    str(tuple(motion_BTF.shape)),
                    "motion tower",
                    "Pass the motion in the representation named.",
                )
            )
        tokens_BNF, mask_BN = stack_frames(motion_BTF, lengths_B, self.config.frames_per_token)
        return self.proj[representation](tokens_BNF), mask_BN

    def encode(self, tokens_BND: Tensor, mask_BN: Tensor, t_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (mu, logvar) of projected tokens: the part shared by all representations."""
        state_BD = self.hidden(tokens_BND, mask_BN, t_B, num_queries=1)[:, 0]
        mu, logvar = self.dist(state_BD).chunk(2, dim=-1)
        return mu, logvar

    def hidden(
        self, tokens_BND: Tensor, mask_BN: Tensor, t_B: Tensor | None = None, num_queries: int | None = None
    ) -> Tensor:
        """Return encoder states at the first `num_queries` positions, or at all of them."""
        time = None if t_B is None else self.time(t_B.expand(len(tokens_BND)))
        return self.encoder(*assemble(self.token, time, tokens_BND, mask_BN, self.positions), num_queries)


class TextTower(nn.Module):
    """Token states of a frozen text encoder -> posterior over the shared latent."""

    def __init__(self, config: MotionRewardConfig) -> None:
        super().__init__()
        dim = config.latent_dim
        self.embed = nn.Linear(config.text_token_dim, dim)
        self.token = nn.Parameter(torch.randn(1, dim))
        self.positions = LearnedPositions(config.max_positions, dim)
        self.time = TimeEmbedding(dim) if config.text_time else None
        self.encoder = SkipEncoder(dim, config.num_layers, config.text_heads, config.ff_dim, config.dropout)
        self.dist = nn.Linear(dim, 2 * dim)

    def forward(self, tokens_BLE: Tensor, mask_BL: Tensor, t_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (mu, logvar), each (B, d), of caption tokens; masked tokens are not read.

        Raises:
            ValueError: if a time is given to a tower without time embedding.
        """
        if t_B is not None and self.time is None:
            raise ValueError("this text tower has no time embedding (text_time is False)")
        time = None if t_B is None or self.time is None else self.time(t_B.expand(len(tokens_BLE)))
        sequence = assemble(self.token, time, self.embed(tokens_BLE), mask_BL, self.positions)
        mu, logvar = self.dist(self.encoder(*sequence, 1)[:, 0]).chunk(2, dim=-1)
        return mu, logvar


def assemble(
    token_1D: Tensor, time_BD: Tensor | None, tokens_BND: Tensor, mask_BN: Tensor, positions: LearnedPositions
) -> tuple[Tensor, Tensor]:
    """Return [class, optional time, tokens] plus positions, and the mask in which the first one or two are valid."""
    batch = len(tokens_BND)
    front = [token_1D.expand(batch, 1, -1)] + ([] if time_BD is None else [time_BD[:, None]])
    sequence = torch.cat([*front, tokens_BND], dim=1)
    mask = torch.cat([mask_BN.new_ones(batch, len(front)), mask_BN], dim=1)
    return sequence + positions(sequence.shape[1]), mask
