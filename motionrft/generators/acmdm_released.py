"""Released ACMDM files: which ones belong together, and their tensors under our names (the same, below a prefix)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.generators.acmdm import ACMDMGenerator
from motionrft.generators.acmdm_autoencoder import ACMDMLatentConfig, latent
from motionrft.generators.acmdm_network import HEAD_DIM, SCALES, ACMDMConfig
from motionrft.generators.base import Generator
from motionrft.generators.released import ReleasedFormat, ReleasedGenerator

_AVERAGE, _PLAIN, _AUTOENCODER = "ema_acmdm", "acmdm", "ae"  # entries of the files that hold tensors
_TEXT = "clip_model."  # a frozen text encoder inside some files
_JOINTS, _AXES = 22, 3
_MAX_FRAMES = 196
_LONGEST = "max_length"  # entry of files of ours whose rotary base is not the published one
_BLOCK = re.compile(r"ACMDMTransformer\.(\d+)\.")
_UPSAMPLING = re.compile(r"decoder\.model\.(\d+)\.conv\.weight")


class ACMDMReleased(ReleasedFormat):
    """Generator file (average of the parameters preferred), auto-encoder, statistics of its latents and of joints.

    The published joint statistics are three numbers each, and their mean height is wrong: too many float32 rows were
    summed. The weights were trained with them, so they are kept as they are. Models of ours may have statistics per
    joint: they are written (J, 3), which broadcasts in the same way.
    """

    family = "acmdm"
    text = "ACMDM: folder with ACMDM*/model/latest.tar, AE_2D_Causal (latent models), 22x3_mean.npy and 22x3_std.npy"
    licence = "MIT (neu-vi/ACMDM); trained on HumanML3D, whose motions have their own terms"

    def patterns(self) -> Mapping[str, tuple[str, ...]]:
        """Return role -> glob patterns. A weight file in NAME/model/ finds the auto-encoder two folders up."""

        def around(*names: str) -> tuple[str, ...]:
            return tuple(prefix + name for prefix in ("**/", "../../") for name in names)

        return {
            "weights": ("**/ACMDM*/model/latest.tar", "model/latest.tar", "latest.tar", "ACMDM*.tar"),
            "autoencoder": around("AE_2D_Causal*/model/latest.tar", "VAE_2D_Causal*/model/latest.tar"),
            "latent_mean": around("AE_2D_Causal*/*_Post_Mean.npy", "VAE_2D_Causal*/*_Post_Mean.npy"),
            "latent_std": around("AE_2D_Causal*/*_Post_Std.npy", "VAE_2D_Causal*/*_Post_Std.npy"),
            "mean": around("22x3_mean.npy", "Mean_22x3.npy"),
            "std": around("22x3_std.npy", "Std_22x3.npy"),
        }

    def read(self, files: Mapping[str, Any], options: Mapping[str, str]) -> ReleasedGenerator:
        """Return the model; see `ReleasedFormat.read`."""
        del options
        content = _entry(files, "weights", "the generator's latest.tar")
        chosen = _AVERAGE if _AVERAGE in content else _PLAIN
        tensors = _tensors(content, chosen)
        network = {name: t for name, t in tensors.items() if not name.startswith(_TEXT)}
        dropped = [f"{chosen}.{name}" for name in tensors if name.startswith(_TEXT)]
        dropped += [name for name in content if name not in (chosen, _LONGEST)]
        model, frozen = _network_sizes(network), {}
        if _shape(network, "x_embedder.weight", 4)[1] != _AXES:
            autoencoder = _tensors(_entry(files, "autoencoder", "the auto-encoder's latest.tar"), _AUTOENCODER)
            model = _latent_sizes(model, autoencoder)
            frozen = {f"autoencoder.{name}": t for name, t in autoencoder.items()}
            frozen["mean"] = _entry(files, "latent_mean", "AE_2D_Causal_Post_Mean.npy").float()
            frozen["std"] = _entry(files, "latent_std", "AE_2D_Causal_Post_Std.npy").float()
        return ReleasedGenerator(
            model=model,
            network=network,
            frozen=frozen,
            mean=_statistics(files, "mean"),
            std=_statistics(files, "std"),
            text_encoder="clip:openai/clip-vit-base-patch32",
            pooled_dim=model.text_dim,
            max_frames=int(content.get(_LONGEST, _MAX_FRAMES)),
            sampling_steps=50,
            guidance=model.default_guidance,
            solver="euler",
            dropped=tuple(dropped),
            variant=_zoo_name(model),
        )

    def write(self, generator: Generator) -> dict[str, Any]:
        """Return file name -> content. `text_gain` becomes part of the weights that read the sentence vector.

        The published code builds its models for 196 frames; a model of ours for another number, which changes the
        rotary base, says so in an entry that only `read` knows.
        """
        assert isinstance(generator, ACMDMGenerator)
        model, longest = generator.config, generator.spec.max_frames
        if model.output != "velocity":
            got, do = f"output {model.output!r}", "The published code knows velocities only."
            raise ConfigError(explain("a network that gives velocities", got, "export of acmdm", do))
        network = dict(generator.network.state_dict())
        network["y_embedder.weight"] = network["y_embedder.weight"] * model.text_gain
        name = _zoo_name(model)
        entries: dict[str, Any] = {_PLAIN: network, _AVERAGE: network, "ep": 0, "total_it": 0}
        files: dict[str, Any] = {
            f"{name}/model/latest.tar": entries | ({} if longest == _MAX_FRAMES else {_LONGEST: longest}),
            "22x3_mean.npy": _pooled(generator.normalizer.mean),
            "22x3_std.npy": _pooled(generator.normalizer.std),
        }
        if isinstance(model, ACMDMLatentConfig):
            kind = "VAE_2D_Causal" if model.variational else "AE_2D_Causal"
            state = dict(generator.space.autoencoder.state_dict())
            files[f"{kind}/model/latest.tar"] = {_AUTOENCODER: state, "ep": 0, "total_it": 0}
            files[f"{kind}/{kind}_Post_Mean.npy"] = generator.space.mean
            files[f"{kind}/{kind}_Post_Std.npy"] = generator.space.std
        return files


def _entry(files: Mapping[str, Any], role: str, name: str) -> Any:
    if role not in files:
        raise CheckpointError(
            explain(
                name,
                "no such file",
                f"released ACMDM, {role}",
                "Give the folder (checkpoints/t2m) that holds the generator's folder and the auto-encoder's.",
            )
        )
    return files[role]


def _tensors(content: Any, key: str) -> dict[str, Tensor]:
    found = content.get(key) if isinstance(content, Mapping) else None
    if not (isinstance(found, Mapping) and found and all(isinstance(t, Tensor) for t in found.values())):
        got = f"entries {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(explain(f"tensors under {key!r}", got, "released ACMDM", "Check which file this is."))
    return dict(found)


def _shape(tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors or tensors[name].dim() != dims:
        got = "none" if name not in tensors else f"shape {tuple(tensors[name].shape)}"
        raise CheckpointError(
            explain(f"a tensor {name!r} of {dims} dimensions", got, "released ACMDM", "Check which file this is.")
        )
    return tuple(tensors[name].shape)


def _network_sizes(network: Mapping[str, Tensor]) -> ACMDMConfig:
    width, _, _, patch = _shape(network, "x_embedder.weight", 4)
    blocks = {int(found[1]) for name in network if (found := _BLOCK.match(name))}
    if width % HEAD_DIM or _JOINTS % patch or not blocks:
        raise CheckpointError(
            explain(
                f"blocks of a width divisible by {HEAD_DIM} and patches that divide {_JOINTS} joints",
                f"{len(blocks)} blocks, width {width}, patch {patch}",
                "released ACMDM",
                "Models of meshes and of other skeletons are not read.",
            )
        )
    text_dim = _shape(network, "y_embedder.weight", 2)[1]
    return ACMDMConfig(layers=max(blocks) + 1, heads=width // HEAD_DIM, patch=patch, text_dim=text_dim)


def _latent_sizes(model: ACMDMConfig, autoencoder: Mapping[str, Tensor]) -> ACMDMLatentConfig:
    width, channels = _shape(autoencoder, "decoder.conv_in.weight", 4)[:2]
    upsampling = [int(found[1]) for name in autoencoder if (found := _UPSAMPLING.fullmatch(name))]
    return latent(
        model,
        latent_channels=channels,
        ae_width=width,
        ae_depth=min(upsampling, default=0),
        ae_dropout=0.2,
        variational=_shape(autoencoder, "encoder.conv_out.weight", 4)[0] == 2 * channels,
    )


def _statistics(files: Mapping[str, Any], role: str) -> Tensor | None:
    found = files.get(role)
    return None if found is None else found.float().flatten()  # (3,) as published, (J, 3) where written by us


def _pooled(values_D: Tensor) -> Tensor:
    """Return (3,) where every joint has the same three numbers, else (J, 3)."""
    values = values_D.unflatten(0, (-1, _AXES))
    return values[0] if torch.equal(values, values[:1].expand_as(values)) else values


def _zoo_name(model: ACMDMConfig) -> str:
    """Return the published name of a model, after its scale and patch."""
    scales = {blocks: name for name, blocks in SCALES.items()}
    scale = scales.get(model.layers) if model.layers == model.heads else None
    space = "Flow" if isinstance(model, ACMDMLatentConfig) else "Raw-Flow"
    return f"ACMDM-{space}-{scale or f'{model.layers}x{model.heads}'}-PatchSize{model.patch}"
