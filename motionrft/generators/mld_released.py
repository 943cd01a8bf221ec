"""Released files of the latent families: MLD (original, v1, MLD++) and MotionLCM (v1, V2), read and written back.

One file holds denoiser and autoencoder below `denoiser.` and `vae.`, and copies of evaluators and text encoders that do
not belong to the generator. The autoencoder may also lie in a file of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.generators.base import Generator, ModelConfig
from motionrft.generators.mld import MLDConfig
from motionrft.generators.motionlcm import MotionLCMConfig
from motionrft.generators.released import ReleasedFormat, ReleasedGenerator, renamed
from motionrft.representations.kinematic_layout import KIT_LAYOUT

_CLIP, _T5 = "clip:openai/clip-vit-large-patch14", "sentence-transformers/sentence-t5-large"
_UNUSED = "denoiser.mem_pos.pe"  # only the original release carries it; nothing reads it
_DROPPED = (
    _UNUSED,
    "t2m_textencoder.",
    "t2m_moveencoder.",
    "t2m_motionencoder.",
    "text_encoder.",
    "reward_model.",
    "controlnet.",
    "traj_encoder.",
)
_VARIANTS = {"original": _CLIP, "v1": _T5, "v2": _T5}


class _LatentFormat(ReleasedFormat):
    """What both families share. A settings file says what tensors cannot; published models need none."""

    options: ClassVar[Mapping[str, str]] = {
        "variant": "original (CLIP text), v1 or v2 (Sentence-T5 text); only needed where the file does not tell"
    }
    names: ClassVar[tuple[str, ...]]
    sampling_steps: ClassVar[int]

    @property
    def settings_file(self) -> str:
        """Name of the file that `write` adds for models that are not as published."""
        return f"{self.family}_settings.json"

    def patterns(self) -> Mapping[str, tuple[str, ...]]:
        """Return where weights, a separate autoencoder, settings and motion statistics are looked for."""
        weights = tuple(f"{place}{name}" for name in (*self.names, "*.ckpt") for place in ("", "**/"))
        return {
            "weights": weights,
            "vae": ("vae_humanml.ckpt", "vae*.ckpt"),
            "settings": (self.settings_file,),
            "mean": ("Mean.npy", "mean.npy"),
            "std": ("Std.npy", "std.npy"),
        }

    def read(self, files: Mapping[str, Any], options: Mapping[str, str]) -> ReleasedGenerator:
        """Return the model in our terms. See `ReleasedFormat.read`."""
        if "weights" not in files:
            raise CheckpointError(explain("a checkpoint file", "none", f"released {self.family}", "Check the path."))
        tensors, beside = _state_dict(files["weights"], self.family)
        where = f"released {self.family} file"
        network, _ = renamed(tensors, "denoiser.", ("vae.", *_DROPPED), where)
        network.pop(_UNUSED.removeprefix("denoiser."), None)
        holder = tensors if any(name.startswith("vae.") for name in tensors) else None
        if holder is None:
            if "vae" not in files:
                got, do = (
                    "only a denoiser",
                    f"Put the autoencoder's file ({', '.join(self.patterns()['vae'])}) beside it.",
                )
                raise CheckpointError(explain("an autoencoder, below 'vae.'", got, where, do))
            holder, _ = _state_dict(files["vae"], "autoencoder")
        vae, _ = renamed(holder, "vae.", ("denoiser.", *_DROPPED), "released autoencoder")
        settings = files.get("settings", {})
        variant = _variant(tensors, options.get("variant", ""), where)
        sizes = _sizes_of(network, vae, settings, where)
        return ReleasedGenerator(
            model=self.model(network, sizes, settings, variant),
            network=network,
            frozen={**{f"vae.{name}": t for name, t in vae.items()}, "scale": _scale(settings)},
            mean=files.get("mean"),
            std=files.get("std"),
            text_encoder=settings.get("text_encoder", _VARIANTS[variant]),
            pooled_dim=sizes["text_dim"],
            max_frames=settings.get("max_frames", 196),
            fps=12.5 if vae["skel_embedding.weight"].shape[1] == KIT_LAYOUT.dim else 20.0,
            sampling_steps=self.sampling_steps,
            dropped=tuple(name for name in tensors if name.startswith(_DROPPED)) + beside,
            variant=f"{self.family} {variant}",
        )

    @abstractmethod
    def model(
        self, network: Mapping[str, Tensor], sizes: dict[str, Any], settings: Mapping[str, Any], variant: str
    ) -> ModelConfig:
        """Return the configuration of sizes derived from tensors."""

    def write(self, generator: Generator) -> dict[str, Any]:
        """Return the checkpoint file with published names, nesting and shapes.

        The evaluators that published files carry along are not part of the generator and not written; a text gain is
        multiplied into the text projection. Settings are written where a published model would have others.

        Raises:
            ConfigError: an autoencoder that reads groups of frames, which the published code cannot build.
        """
        config = generator.config
        if config.frames_per_token != 1:
            got, do = f"frames_per_token={config.frames_per_token}", "Only models that read frame by frame have a file."
            raise ConfigError(explain("an autoencoder of single frames", got, f"export of {self.family}", do))
        network = {name: t.detach().float().cpu().clone() for name, t in generator.network.state_dict().items()}
        network["emb_proj.1.weight"] *= config.text_gain
        state = {f"denoiser.{name}": t for name, t in network.items()}
        original = isinstance(config, MLDConfig) and config.spare_positions
        if original:
            state[_UNUSED] = torch.zeros_like(network["query_pos.pe"])
        frozen = {name: t.detach().float().cpu().clone() for name, t in generator.frozen.state_dict().items()}
        scale = float(frozen["scale"])
        vae = {name: t for name, t in frozen.items() if name.startswith("vae.")}
        data = "kit" if generator.features == KIT_LAYOUT.dim else "humanml"
        version = "" if config.projected or original else "_v1"
        written: dict[str, Any] = {f"{self.family}_{data}{version}.ckpt": {"state_dict": {**vae, **state}}}
        settings = {**_settings_of(config), "scale": scale, "max_frames": generator.spec.max_frames}
        usual = {**_usual(config.projected), "max_frames": settings["max_frames"]}
        if settings != {name: usual[name] for name in settings}:
            written[self.settings_file] = {**settings, "text_encoder": generator.spec.text_encoder}
        return written


class MLDFormat(_LatentFormat):
    """MLD: the original Lightning file, MLD v1 and MLD++."""

    family = "mld"
    text = "1222_mld_humanml3d_FID041.ckpt (original), mld_humanml_v1.ckpt, or mld_humanml.ckpt (MLD++)"
    licence = "MLD: MIT. MLD v1 and MLD++ come with MotionLCM: non-commercial use only."
    names = ("1222_mld_humanml3d_FID041.ckpt", "mld_humanml.ckpt", "mld_humanml_v1.ckpt", "mld*.ckpt", "best.ckpt")
    sampling_steps = 50

    def model(
        self, network: Mapping[str, Tensor], sizes: dict[str, Any], settings: Mapping[str, Any], variant: str
    ) -> MLDConfig:
        """Return the configuration; refuses a consistency model."""
        if "time_embedding.cond_proj.weight" in network:
            got = "a guidance projection (time_embedding.cond_proj)"
            raise CheckpointError(explain("an MLD denoiser", got, "released file", "Import it as family motionlcm."))
        return MLDConfig(**sizes, scale_latents=False, spare_positions=variant == "original")


class MotionLCMFormat(_LatentFormat):
    """MotionLCM v1 and V2, without their control networks."""

    family = "motionlcm"
    text = "motionlcm_humanml_v1.ckpt or motionlcm_humanml.ckpt (V2)"
    licence = "MotionLCM: non-commercial use only."
    names = ("motionlcm_humanml.ckpt", "motionlcm_humanml_v1.ckpt", "motionlcm*.ckpt")
    sampling_steps = 4

    def model(
        self, network: Mapping[str, Tensor], sizes: dict[str, Any], settings: Mapping[str, Any], variant: str
    ) -> MotionLCMConfig:
        """Return the configuration; the two versions differ in times and guidance."""
        projection = network.get("time_embedding.cond_proj.weight")
        if projection is None:
            got = "no guidance projection (time_embedding.cond_proj)"
            raise CheckpointError(explain("a MotionLCM denoiser", got, "released file", "Import it as family mld."))
        usual = _usual("latent_pre.weight" in network)
        found = {name: settings.get(name, usual[name]) for name in ("sampling", "grid_points", "huber")}
        return MotionLCMConfig(**sizes, guidance_dim=projection.shape[1], **found)


def _usual(projected: bool) -> dict[str, Any]:
    """Return what published models of either latent shape have and tensors do not say."""
    lcm = {"sampling": "tuned", "grid_points": 10, "huber": 0.5} if projected else {}
    return {
        "heads": 4,
        "text_relu": not projected,
        "scale": 1.0,
        "sampling": "grid",
        "grid_points": 50,
        "huber": 0.001,
        **lcm,
    }


def _settings_of(config: Any) -> dict[str, Any]:
    names = ["heads", "text_relu"]
    if isinstance(config, MotionLCMConfig):
        names += ["sampling", "grid_points", "huber"]
    return {name: getattr(config, name) for name in names}


def _state_dict(content: Any, what: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the named tensors of a file, nested below `state_dict` or not, and the entries beside them."""
    nested = isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping)
    found = content["state_dict"] if nested else content
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        keys = sorted(map(str, content))[:6] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            explain("named tensors, or such below 'state_dict'", f"{keys}", f"released {what} file", "Check the file.")
        )
    return dict(found), tuple(str(name) for name in content if name != "state_dict") if nested else ()


def _variant(tensors: Mapping[str, Tensor], asked: str, where: str) -> str:
    """Return which published model this is. Original and v1 differ in the text they read, not in what they compute."""
    if asked and asked not in _VARIANTS:
        raise ConfigError(explain(f"a variant of {tuple(_VARIANTS)}", repr(asked), where, "Correct --variant."))
    told = "v2" if "denoiser.latent_pre.weight" in tensors else "original" if _UNUSED in tensors else ""
    if asked and told and asked != told:
        raise ConfigError(explain(f"variant {told!r}, as its tensors say", repr(asked), where, "Leave --variant out."))
    return asked or told or "v1"


def _sizes_of(
    network: Mapping[str, Tensor], vae: Mapping[str, Tensor], settings: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the fields of `LatentSizes` that tensors, settings and published models tell.

    Raises:
        CheckpointError: a tensor that every model of the families has is not there.
    """
    try:
        width = vae["skel_embedding.weight"].shape[0]
        projected = "latent_pre.weight" in network
        half = len({name.split(".")[2] for name in network if name.startswith("encoder.input_blocks.")})
        usual = _usual(projected)
        return {
            "latent_tokens": vae["global_motion_token"].shape[0] // 2,
            "latent_dim": network["latent_pre.weight"].shape[1] if projected else width,
            "width": width,
            "layers": 2 * half + 1,
            "heads": settings.get("heads", usual["heads"]),
            "ff": network["encoder.middle_block.linear1.weight"].shape[0],
            "dropout": 0.1,
            "text_dim": network["emb_proj.1.weight"].shape[1],
            "text_gain": 1.0,
            "text_relu": settings.get("text_relu", usual["text_relu"]),
            "time_dim": network["time_embedding.linear_1.weight"].shape[1],
            "positions": network["query_pos.pe"].shape[0],
            "smooth_positions": False,
        }
    except KeyError as error:
        raise CheckpointError(
            explain(f"tensor {error.args[0]}", "none of that name", where, "Check which released file this is.")
        ) from error


def _scale(settings: Mapping[str, Any]) -> Tensor:
    return torch.tensor(float(settings.get("scale", 1.0)))


__all__ = ["MLDFormat", "MotionLCMFormat"]
