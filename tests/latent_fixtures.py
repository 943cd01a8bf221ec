"""Latent generators for tests: with recorded weights, or small and random."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from motionrft.core.protocols import GeneratorSpec
from motionrft.core.types import Condition, MotionBatch, Representation, valid_mask
from motionrft.generators.base import Build
from motionrft.generators.mld import MLDConfig, MLDGenerator
from motionrft.generators.motionlcm import MotionLCMConfig, MotionLCMGenerator
from motionrft.representations.normalize import Normalizer
from tests.paths import shared_path

KIND = Representation.KINEMATIC


class Recorded:
    """Arrays of one reference file, and generators with its weights.

    Args:
        file: name below the folder of reference data.
    """

    def __init__(self, file: str) -> None:
        with np.load(shared_path(f"golden/{file}"), allow_pickle=False) as found:
            self.arrays = {name: found[name] for name in found.files}
        self.settings = json.loads(str(self.arrays["config_json"]))

    def __call__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def weights(self, prefix: str) -> dict[str, Tensor]:
        return {n[len(prefix) :]: torch.from_numpy(a) for n, a in self.arrays.items() if n.startswith(prefix)}

    def generator(self, model: str = "") -> MLDGenerator | MotionLCMGenerator:
        """Return the generator called `model` with the recorded weights."""
        at = f"{model}/" if model else ""
        found = self.settings[model] if model else self.settings
        sizes = dict(
            latent_tokens=found["latent_dim"][0],
            latent_dim=found["latent_dim"][1],
            width=found["hidden_dim"] or found["latent_dim"][1],
            layers=found["layers"],
            heads=found["heads"],
            ff=found["ff"],
            text_relu=found["text_act_fn"] == "relu",
            text_gain=1.0,
            time_dim=found["time_dim"],
            smooth_positions=False,
        )
        null = self.arrays.get(f"{at}in/text_uncond")
        if found["time_cond_proj_dim"]:
            tuned = "timesteps_by_steps" in found
            config = MotionLCMConfig(
                **sizes, guidance_dim=found["time_cond_proj_dim"], sampling="tuned" if tuned else "grid"
            )
            generator = MotionLCMGenerator(build_of("motionlcm", 768), config)
        else:
            config = MLDConfig(**sizes, scale_latents=False)
            generator = MLDGenerator(build_of("mld", 768, torch.from_numpy(null[:, 0])), config)
        generator.network.load_state_dict(self.weights(f"{at}sd/denoiser."), strict=True)
        vae = self.weights(f"{at}sd/vae.") or (self.weights("mldpp/sd/vae.") if model == "lcm_v2" else {})
        if vae:
            generator.latents.vae.load_state_dict(vae, strict=True)
        generator.network.eval()
        return generator


def build_of(family: str, text: int, null_BC: Tensor | None = None, solver: str = "", features: int = 263) -> Build:
    """Return what a generator of normalised motion needs."""
    spec = GeneratorSpec(family, KIND, 20.0, 60, "stub", "eps", 1000, 7.5)
    statistics = Normalizer(torch.zeros(features), torch.ones(features), KIND)
    null = None if null_BC is None else condition(null_BC)
    return Build(spec, statistics, text, text, solver, null=null)


def condition(pooled_BC: Tensor) -> Condition:
    """Return sentence vectors as a condition."""
    return Condition(pooled_BC[:, None], torch.ones(len(pooled_BC), 1, dtype=torch.bool), pooled_BC)


def close(got: Tensor, want: Tensor, limit: float) -> None:
    """Compare by the largest difference over the largest value, at least 1."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1)
    assert float(error) < limit, f"{float(error):.3g} >= {limit:g}"


def frame_objective(decoded_BTD: Tensor, feats_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the scalar whose gradients are recorded: decoded x features over valid frames, per valid frame."""
    return (decoded_BTD * feats_BTD)[mask_BT].sum() / mask_BT.sum()


def gradient_norms(module: torch.nn.Module, names: np.ndarray) -> Tensor:
    """Return the gradient norm of every named parameter; all parameters must be named."""
    params: Mapping[str, Tensor] = dict(module.named_parameters())
    assert sorted(str(n) for n in names) == sorted(params)
    return torch.stack([params[str(n)].grad.norm() for n in names])


SMALL = MLDConfig(latent_tokens=2, latent_dim=8, width=16, layers=3, heads=2, ff=24, text_dim=12, time_dim=16)
SMALL_LCM = MotionLCMConfig(
    latent_tokens=2, latent_dim=8, width=16, layers=3, heads=2, ff=24, text_dim=12, time_dim=16, guidance_dim=16
)


def small_mld(seed: int = 0, features: int = 263, **changes: object) -> MLDGenerator:
    """Return a random generator whose every tensor matters."""
    torch.manual_seed(seed)
    null = torch.randn(1, 12)
    generator = MLDGenerator(build_of("mld", 12, null, features=features), replace(SMALL, **changes))
    return generator


def small_lcm(seed: int = 0, features: int = 263, **changes: object) -> MotionLCMGenerator:
    """Return a random consistency model; the guidance projection is not zero."""
    torch.manual_seed(seed)
    generator = MotionLCMGenerator(build_of("motionlcm", 12, features=features), replace(SMALL_LCM, **changes))
    torch.nn.init.normal_(generator.network.time_embedding.cond_proj.weight, std=0.3)
    return generator


def batch_of(rows: int = 4, frames: int = 16, features: int = 263, seed: int = 1) -> MotionBatch:
    """Return clips of several lengths with sentence vectors of 12 features; padding is zero."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([16, 11, 7, 2])[:rows].clamp(max=frames)
    motion = torch.randn(rows, frames, features, generator=draw) * valid_mask(lengths, frames)[..., None]
    text = condition(torch.randn(rows, 12, generator=draw))
    ids = tuple(f"clip{i}" for i in range(rows))
    keys = torch.arange(rows) * 17 + 3
    return MotionBatch(ids, {KIND: motion}, lengths, 20.0, ids, text, torch.full((rows,), -1), keys)
