"""Released MDM checkpoints: `model*.pt` with the `args.json` beside it.

Tensor names are ours. The file is a flat mapping of tensors, or {"model", "model_avg"} where it was trained with a
parameter average. args.json is authoritative: frame mask, diffusion steps and text encoder cannot be seen in the
tensors; whatever can be seen must agree with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.types import Representation
from motionrft.generators.base import Generator
from motionrft.generators.mdm_network import OFFICIAL, interleaved_sinusoid
from motionrft.generators.released import ReleasedFormat, ReleasedGenerator

FRAMES = 196
"""Longest motion of every release."""
GUIDANCE = 2.5
"""Scale every release is evaluated with."""
FIXED = ("sequence_pos_encoder.pe", "embed_timestep.sequence_pos_encoder.pe")
"""Sinusoid tables stored with the weights; their number of rows varies between files and means nothing."""

_TEXT_TOWER = "clip_model."  # a frozen text encoder, under this name whichever it is
_STACKS = {"trans_enc": "seqTransEncoder", "trans_dec": "seqTransDecoder"}
_ENCODERS = {
    "clip": ("clip-mdm:openai/clip-vit-base-patch32", 512),
    "bert": ("distilbert:distilbert-base-uncased", 768),
}
_DATASETS = {"humanml": (263, 20.0), "kit": (251, 12.5)}  # features, frames per second
_DEFAULTS: dict[str, Any] = {
    "arch": "trans_enc",
    "text_encoder_type": "clip",
    "diffusion_steps": 1000,
    "noise_schedule": "cosine",
    "sigma_small": True,
    "mask_frames": False,
    "use_ema": False,
    "emb_trans_dec": False,
    "emb_policy": "add",
    "cond_mask_prob": 0.1,
    "unconstrained": False,
    "pred_len": 0,
    "context_len": 0,
    "dropout": OFFICIAL.dropout,
    "num_heads": OFFICIAL.heads,
}  # what a file without the field means
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "arch": tuple(_STACKS),
    "text_encoder_type": tuple(_ENCODERS),
    "noise_schedule": ("cosine",),
    "sigma_small": (True,),
    "emb_policy": ("add",),
    "unconstrained": (False,),
    "pred_len": (0,),
    "context_len": (0,),
}  # the others are different models under the same tensor names


@dataclass(frozen=True)
class MDMReleased(ReleasedFormat):
    """Reads and writes the published MDM files.

    Attributes:
        position_rows: rows of the sinusoid tables that `write` stores; the published code expects 5000 by default.
    """

    family = "mdm"
    text = "MDM: model*.pt with args.json (CLIP encoder of 50 or 1000 steps, CLIP or DistilBERT decoder, KIT)"
    licence = "MIT (GuyTevet/motion-diffusion-model)"

    position_rows: int = 5000

    def patterns(self) -> Mapping[str, tuple[str, ...]]:
        """Return role -> glob patterns."""
        return {"weights": ("model*.pt",), "args": ("args.json",)}

    def read(self, files: Mapping[str, Any], options: Mapping[str, str]) -> ReleasedGenerator:
        """Return the model in our terms. See `ReleasedFormat.read`."""
        del options
        for role, name in (("weights", "model*.pt"), ("args", "args.json")):
            if role not in files:
                raise CheckpointError(
                    explain(
                        "model*.pt and args.json of one release",
                        f"no {name}",
                        "released MDM",
                        "Put the args.json that was published with the weights beside them.",
                    )
                )
        args = _DEFAULTS | dict(files["args"])
        for name, known in _SUPPORTED.items():
            if args[name] not in known:
                raise CheckpointError(
                    explain(f"{name} one of {known}", repr(args[name]), "args.json", "This variant is not supported.")
                )
        tensors, unread = _tensors(files["weights"], args)
        network = {n: t.detach() for n, t in tensors.items() if n not in FIXED and not n.startswith(_TEXT_TOWER)}
        sizes = _Sizes.of(network, args["arch"])
        _agree(args, sizes)

        kind = args["text_encoder_type"]
        decoder, tokens = args["arch"] == "trans_dec", kind == "bert"
        steps, text_dropout = int(args["diffusion_steps"]), float(args["cond_mask_prob"])
        config = replace(
            OFFICIAL,
            latent_dim=sizes.width,
            layers=sizes.layers,
            heads=int(args["num_heads"]),
            ff=sizes.ff,
            text_dim=sizes.text_dim,
            dropout=float(args["dropout"]),
            arch="decoder" if decoder else "encoder",
            text="tokens" if tokens else "pooled",
            time_token=decoder and bool(args["emb_trans_dec"]),
            mask_frames=bool(args["mask_frames"]),
            text_dropout=text_dropout,
        )
        dataset, fps = next((name, fps) for name, (d, fps) in _DATASETS.items() if d == sizes.features)
        return ReleasedGenerator(
            model=config,
            network=network,
            text_encoder=_ENCODERS[kind][0],
            token_dim=sizes.text_dim if tokens else 0,
            pooled_dim=0 if tokens else sizes.text_dim,
            max_frames=FRAMES,
            fps=fps,
            train_steps=steps,
            sampling_steps=steps,
            guidance=GUIDANCE if text_dropout > 0 else 1.0,
            solver="ddpm",
            dropped=(*unread, *(name for name in tensors if name not in network)),
            variant=f"{dataset} {config.arch} {kind} {steps} steps",
        )

    def write(self, generator: Generator) -> dict[str, Any]:
        """Return model000000000.pt (flat) and args.json. The published code fixes 4 heads and 1024 hidden units.

        Raises:
            ConfigError: the model is none that the published code could build; the message lists why.
        """
        config, spec = generator.config, generator.spec
        kind = "bert" if config.text == "tokens" else "clip"
        dataset = next((name for name, (d, _) in _DATASETS.items() if d == generator.features), "")
        rules = [
            (spec.representation == Representation.KINEMATIC and dataset != "", "it generates no HumanML3D features"),
            (config.text_dim == _ENCODERS[kind][1], f"its text features are not those of {_ENCODERS[kind][0]}"),
            (not config.norm_first, "norm_first"),
            (not config.condition_bias, "condition_bias"),
            (config.frames_per_token == 1, f"frames_per_token={config.frames_per_token}"),
            (config.text_gain == 1.0, f"text_gain={config.text_gain}"),
            (
                config.mask_frames or spec.max_frames == FRAMES,
                f"without mask_frames it runs at {spec.max_frames} frames",
            ),
        ]
        problems = [text for holds, text in rules if not holds]
        if problems:
            raise ConfigError(
                explain(
                    "a model of the published architecture",
                    "; ".join(problems),
                    "export of MDM",
                    "Only imported models, or models trained with generators.mdm_network.OFFICIAL, can be exported.",
                )
            )
        state = {name: t.detach().cpu() for name, t in generator.network.state_dict().items()}
        table = interleaved_sinusoid(torch.arange(self.position_rows), config.latent_dim)[:, None]
        args = {
            "arch": "trans_dec" if config.arch == "decoder" else "trans_enc",
            "text_encoder_type": kind,
            "diffusion_steps": spec.train_steps,
            "noise_schedule": "cosine",
            "sigma_small": True,
            "mask_frames": config.mask_frames,
            "use_ema": False,
            "emb_trans_dec": config.time_token,
            "emb_policy": "add",
            "latent_dim": config.latent_dim,
            "layers": config.layers,
            "num_heads": config.heads,
            "ff_size": config.ff,
            "dropout": config.dropout,
            "cond_mask_prob": config.text_dropout,
            "pos_embed_max_len": self.position_rows,
            "dataset": dataset,
            "guidance_param": generator.guidance,
            "unconstrained": False,
        }
        return {"model000000000.pt": {**state, **{name: table.clone() for name in FIXED}}, "args.json": args}


def _tensors(content: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Return the tensors to use, and the parts of the file that are left out."""
    parts = [name for name in ("model_avg", "model") if isinstance(content.get(name), Mapping)]
    if not parts:
        # Files of before the parameter average are flat, and so are averages taken out of nested ones.
        return {name: t for name, t in content.items() if isinstance(t, Tensor)}, tuple(
            name for name, t in content.items() if not isinstance(t, Tensor)
        )
    wanted = "model_avg" if args["use_ema"] else "model"
    if wanted not in parts:
        raise CheckpointError(
            explain(
                f"tensors under {wanted!r}, as use_ema={args['use_ema']} in args.json says",
                f"a weight file that holds {parts}",
                "released MDM",
                "Correct use_ema in args.json, or choose the file it belongs to.",
            )
        )
    return content[wanted], tuple(name for name in content if name != wanted)


@dataclass(frozen=True)
class _Sizes:
    """What the tensors themselves tell."""

    features: int
    width: int
    text_dim: int
    layers: int
    ff: int

    @classmethod
    def of(cls, network: Mapping[str, Tensor], arch: str) -> _Sizes:
        """Read them off.

        Raises:
            CheckpointError: tensors of another architecture than `arch`, or of another family.
        """
        stack = _STACKS[arch]
        found = [name for name in _STACKS.values() if any(n.startswith(f"{name}.") for n in network)]
        if found != [stack]:
            raise CheckpointError(
                explain(
                    f"tensors {stack}.*, as arch={arch!r} in args.json says",
                    f"{[f'{name}.*' for name in found] or 'names of another family'} in the weight file",
                    "released MDM",
                    "Use the args.json that was published with these weights.",
                )
            )
        try:
            width, features = network["input_process.poseEmbedding.weight"].shape
            text_dim = network["embed_text.weight"].shape[1]
            ff = network[f"{stack}.layers.0.linear1.weight"].shape[0]
        except KeyError as error:
            raise CheckpointError(
                explain(f"a tensor {error}", "none", "released MDM", "Check which file this is.")
            ) from error
        layers = 1 + max(int(m[1]) for name in network if (m := re.match(rf"{stack}\.layers\.(\d+)\.", name)))
        return cls(features, width, text_dim, layers, ff)


def _agree(args: Mapping[str, Any], sizes: _Sizes) -> None:
    """Compare what args.json says with what the tensors have.

    Raises:
        CheckpointError: naming every field and tensor that contradict each other.
    """
    kind, dataset = args["text_encoder_type"], args.get("dataset")
    told = {d: name for name, (d, _) in _DATASETS.items()}
    rules = [
        *(
            (args.get(name, value) == value, f"{name}={args.get(name)} but {tensor} {value}")
            for name, value, tensor in (
                ("latent_dim", sizes.width, "poseEmbedding.weight has rows:"),
                ("layers", sizes.layers, "blocks in the file:"),
                ("ff_size", sizes.ff, "linear1.weight has rows:"),
            )
        ),
        (
            sizes.text_dim == _ENCODERS[kind][1],
            f"text_encoder_type={kind!r} ({_ENCODERS[kind][1]} features) but embed_text.weight reads {sizes.text_dim}",
        ),
        (kind == "clip" or args["arch"] == "trans_dec", f"text_encoder_type={kind!r} but arch={args['arch']!r}"),
        (sizes.features in told, f"poseEmbedding reads {sizes.features} features, neither 263 (humanml) nor 251 (kit)"),
        (
            dataset is None or told.get(sizes.features) == dataset,
            f"dataset={dataset!r} but poseEmbedding reads {sizes.features} features",
        ),
    ]
    problems = [text for holds, text in rules if not holds]
    if problems:
        raise CheckpointError(
            explain(
                "args.json and tensors of one model",
                "; ".join(problems),
                "released MDM",
                "Use the args.json that was published with these weights.",
            )
        )
