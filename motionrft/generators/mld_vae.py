"""The motion autoencoder of the latent families: any number of frames to N latent tokens and back.

Parameter names are those of the released checkpoints below `vae.`. Letters: B batch, T frames, M = ceil(T /
frames_per_token) groups of them, D features, N latent tokens, d features per latent token, E width. Motions are
normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionrft.core.types import valid_mask
from motionrft.generators.mld_network import LatentSizes, PositionTable
from motionrft.nn.frames import stack_frames, token_mask, unstack_frames


class MotionVAE(nn.Module):
    """Skip-transformer variational autoencoder. What lies beyond a motion's length has no influence.

    Args:
        features: D.
        sizes: of the model.
    """

    def __init__(self, features: int, sizes: LatentSizes) -> None:
        super().__init__()
        width, latent = sizes.width, sizes.latent_dim
        self.global_motion_token = nn.Parameter(torch.randn(2 * sizes.latent_tokens, width))
        self.latent_pre: nn.Module = nn.Linear(width, latent) if sizes.projected else nn.Identity()
        self.latent_post: nn.Module = nn.Linear(latent, width) if sizes.projected else nn.Identity()
        self.query_pos_encoder = PositionTable(sizes)
        self.query_pos_decoder = PositionTable(sizes)
        self.encoder, self.decoder = sizes.stack(), sizes.stack(cross=True)
        self.frames_per_token = sizes.frames_per_token
        patch = features * sizes.frames_per_token
        self.skel_embedding, self.final_layer = nn.Linear(patch, width), nn.Linear(width, patch)

    def encode(self, x_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance (B, N, d) of the latent of normalised motions."""
        groups, mask_BM = stack_frames(x_BTD, lengths_B, self.frames_per_token)
        frames = self.skel_embedding(groups.to(self.skel_embedding.weight.dtype))
        tokens = self.global_motion_token.expand(len(frames), -1, -1)
        count = tokens.shape[1]
        mask = torch.cat([mask_BM.new_ones(len(frames), count), mask_BM], dim=1)
        h = self.encoder(self.query_pos_encoder(torch.cat([tokens, frames], dim=1)), mask)
        mean, logvar = self.latent_pre(h[:, :count]).chunk(2, dim=1)
        return mean, logvar

    def decode(self, z_BNd: Tensor, lengths_B: Tensor, num_frames: int) -> Tensor:
        """Return normalised motions (B, T, D), zeros beyond each length."""
        memory = self.latent_post(z_BNd.to(self.skel_embedding.weight.dtype))
        mask_BM = token_mask(lengths_B, num_frames, self.frames_per_token)
        queries = self.query_pos_decoder(memory.new_zeros(len(memory), mask_BM.shape[1], memory.shape[2]))
        out = self.final_layer(self.decoder(queries, mask_BM, memory))
        out = unstack_frames(out, num_frames, self.frames_per_token)
        return torch.where(valid_mask(lengths_B, num_frames)[..., None], out, 0.0)

    def forward(self, x_BTD: Tensor, lengths_B: Tensor, noise_BNd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (reconstruction of a posterior sample (B, T, D), mean, log-variance (B, N, d))."""
        mean, logvar = self.encode(x_BTD, lengths_B)
        z = sample_posterior(mean, logvar, noise_BNd)
        return self.decode(z, lengths_B, x_BTD.shape[1]), mean, logvar


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return mean + exp(logvar / 2) noise."""
    return mean + (0.5 * logvar).exp() * noise.to(mean.dtype)


class LatentSpace(nn.Module):
    """What a latent generator needs and does not train: autoencoder, latent scale, perhaps the empty caption.

    The diffused state is `scale` times the autoencoder's latent. Released models have scale 1; from scratch it makes
    latents unit variance, which the noise schedule assumes.

    Args:
        features: D.
        sizes: of the model.
        null_C: features of the empty caption; None leaves the buffer out.
    """

    scale: Tensor
    null: Tensor

    def __init__(self, features: int, sizes: LatentSizes, null_C: Tensor | None = None) -> None:
        super().__init__()
        self.vae = MotionVAE(features, sizes)
        self.register_buffer("scale", torch.ones(()))
        if null_C is not None:
            self.register_buffer("null", null_C.detach().float().clone())

    def encode(self, x_BTD: Tensor, lengths_B: Tensor, noise_BNd: Tensor | None = None) -> Tensor:
        """Return states (B, N, d) of normalised motions: posterior samples, or means without noise."""
        mean, logvar = self.vae.encode(x_BTD, lengths_B)
        return self.scale * (mean if noise_BNd is None else sample_posterior(mean, logvar, noise_BNd))

    def decode(self, state_BNd: Tensor, lengths_B: Tensor) -> Tensor:
        """Return normalised motions (B, T, D), T the largest length, zeros beyond each; differentiable."""
        return self.vae.decode(state_BNd / self.scale, lengths_B, int(lengths_B.max()))
