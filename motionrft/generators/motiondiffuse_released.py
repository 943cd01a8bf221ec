"""Released MotionDiffuse checkpoints: `model/latest.tar`, `meta/mean.npy`, `meta/std.npy` and `opt.txt`.

The weight file nests {"encoder", "opt_encoder", "ep", "total_it"}; below "encoder" lie the network under our names and
a whole CLIP ViT-B/32 under `clip.`, image tower included. CLIP was frozen in training, so its public weights are the
same: it is left out here and read as a text encoder.

The statistics belong to the weights: root features and contacts have 1/25 of the dataset's standard deviation, so the
network makes them 25 times larger than other families do; decoded with a dataset's own statistics they would be too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.types import Representation
from motionrft.generators.base import Generator
from motionrft.generators.motiondiffuse_network import OFFICIAL
from motionrft.generators.released import ReleasedFormat, ReleasedGenerator

TEXT_ENCODER, TOKEN_DIM = "clip-tokens:openai/clip-vit-base-patch32", 512
TRAIN_STEPS = 1000
_CLIP = "clip."
_DATASETS = {"t2m": (263, 20.0), "kit": (251, 12.5)}  # features, frames per second
_HEADS = {"num_heads": OFFICIAL.heads, "text_num_heads": OFFICIAL.text_heads}
_NOTE = """The published file holds a whole CLIP ViT-B/32 beside the network, as `encoder` tensors under `clip.`.
It was never trained there, and it is not part of this export. The published code loads strictly: put the weights of
openai/clip-vit-base-patch32 (as the `clip` package names and shapes them, float32) under these names first:

"""


class MotionDiffuseReleased(ReleasedFormat):
    """Reads and writes the published MotionDiffuse files."""

    family = "motiondiffuse"
    text = "MotionDiffuse: model/latest.tar with meta/mean.npy and meta/std.npy (HumanML3D or KIT)"
    licence = "non-commercial use only (mingyuan-zhang/MotionDiffuse)"

    def patterns(self) -> Mapping[str, tuple[str, ...]]:
        """Return role -> glob patterns."""
        return {
            "weights": ("model/latest.tar", "latest.tar"),
            "mean": ("meta/mean.npy", "mean.npy", "../meta/mean.npy"),
            "std": ("meta/std.npy", "std.npy", "../meta/std.npy"),
            "opt": ("opt.txt", "../opt.txt"),
        }

    def read(self, files: Mapping[str, Any], options: Mapping[str, str]) -> ReleasedGenerator:
        """Return the model in our terms; `opt` may be missing. See `ReleasedFormat.read`."""
        del options
        missing = [role for role in ("weights", "mean", "std") if role not in files]
        if missing:
            raise CheckpointError(
                explain(
                    "model/latest.tar, meta/mean.npy and meta/std.npy of one release",
                    f"no {', '.join(missing)}",
                    "released MotionDiffuse",
                    "Keep the folder as published: its statistics are not those of the dataset.",
                )
            )
        content = files["weights"]
        tensors = content.get("encoder")
        if not isinstance(tensors, Mapping):
            raise CheckpointError(
                explain(
                    "tensors under 'encoder'", f"{sorted(map(str, content))[:6]}", "released MotionDiffuse", "Check it."
                )
            )
        network = {name: t.detach() for name, t in tensors.items() if not name.startswith(_CLIP)}
        mean, std = files["mean"].flatten().float(), files["std"].flatten().float()
        opt = _settings(files.get("opt", ""))
        sizes = _sizes(network)
        features = sizes.pop("features")
        _agree(opt, sizes, features, mean, std)
        dataset, fps = next((name, fps) for name, (d, fps) in _DATASETS.items() if d == features)
        heads = {name: int(opt.get(name, default)) for name, default in _HEADS.items()}
        train_steps = int(opt.get("diffusion_steps", TRAIN_STEPS))
        return ReleasedGenerator(
            model=replace(OFFICIAL, **sizes, heads=heads["num_heads"], text_heads=heads["text_num_heads"]),
            network=network,
            mean=mean,
            std=std,
            text_encoder=TEXT_ENCODER,
            token_dim=sizes["text_dim"],
            max_frames=sizes["positions"],
            fps=fps,
            train_steps=train_steps,
            sampling_steps=train_steps,
            guidance=1.0,
            solver="ddpm",
            dropped=(*(n for n in content if n != "encoder"), *(n for n in tensors if n.startswith(_CLIP))),
            variant=f"{dataset} {train_steps} steps",
        )

    def write(self, generator: Generator) -> dict[str, Any]:
        """Return model/latest.tar without CLIP, meta/*.npy, opt.txt, and model/not_included.txt naming CLIP's tensors.

        Raises:
            ConfigError: the model is none that the published code could build; the message lists why.
        """
        config, spec = generator.config, generator.spec
        dataset = next((name for name, (d, _) in _DATASETS.items() if d == generator.features), "")
        rules = [
            (spec.representation == Representation.KINEMATIC and dataset != "", "it generates no HumanML3D features"),
            (config.text_dim == TOKEN_DIM, f"its text tokens have {config.text_dim} features, CLIP's {TOKEN_DIM}"),
            (config.target == "noise", f"target={config.target!r}"),
            (generator.guidance == 1.0, f"guidance {generator.guidance}"),
        ]
        problems = [text for holds, text in rules if not holds]
        if problems:
            raise ConfigError(
                explain(
                    "a model of the published architecture",
                    "; ".join(problems),
                    "export of MotionDiffuse",
                    "Train with target=noise on CLIP's tokens and HumanML3D features, or export an imported model.",
                )
            )
        state = {name: t.detach().cpu() for name, t in generator.network.state_dict().items()}
        opt = {
            "dataset_name": dataset,
            "latent_dim": config.latent_dim,
            "ff_size": config.ff,
            "num_layers": config.layers,
            "num_heads": config.heads,
            "num_text_layers": config.text_layers,
            "text_latent_dim": config.text_width,
            "text_ff_size": config.text_ff,
            "text_num_heads": config.text_heads,
            "diffusion_steps": spec.train_steps,
            "no_clip": False,
            "no_eff": False,
        }
        lines = ["------------ Options -------------", *(f"{name}: {value}" for name, value in opt.items())]
        return {
            "model/latest.tar": {"encoder": state, "opt_encoder": {}, "ep": 0, "total_it": 0},
            "meta/mean.npy": generator.normalizer.mean.cpu(),
            "meta/std.npy": generator.normalizer.std.cpu(),
            "opt.txt": "\n".join([*lines, "-------------- End ----------------", ""]),
            "model/not_included.txt": _NOTE + "".join(f"{name}\n" for name in clip_names()),
        }


def clip_names() -> list[str]:
    """Return the names that CLIP ViT-B/32 has in a published file: 302, text and image tower."""
    layer = [f"{part}.{kind}" for part in ("attn.out_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
             for kind in ("weight", "bias")]  # fmt: skip
    layer = ["attn.in_proj_weight", "attn.in_proj_bias", *layer]
    blocks = [f"transformer.resblocks.{i}.{name}" for i in range(12) for name in layer]
    norms = [f"ln_{place}.{kind}" for place in ("pre", "post") for kind in ("weight", "bias")]
    visual = ["class_embedding", "positional_embedding", "proj", "conv1.weight", *norms, *blocks]
    text = ["positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", *blocks]
    return [_CLIP + name for name in [*text, "ln_final.weight", "ln_final.bias", *(f"visual.{n}" for n in visual)]]


def _settings(text: str) -> dict[str, str]:
    """Return the "name: value" lines of opt.txt."""
    return {m[1]: m[2].strip() for line in text.splitlines() if (m := re.fullmatch(r"(\w+):(.*)", line.strip()))}


def _sizes(network: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the tensors tell: fields of the config, and the number of features.

    Raises:
        CheckpointError: tensors of another family.
    """

    def blocks(stack: str) -> int:
        found = {m[1] for name in network if (m := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))}
        return len(found)

    try:
        width, features = network["joint_embed.weight"].shape
        text_width, text_dim = network["text_pre_proj.weight"].shape
        return {
            "features": features,
            "latent_dim": width,
            "layers": blocks("temporal_decoder_blocks"),
            "ff": network["temporal_decoder_blocks.0.ffn.linear1.weight"].shape[0],
            "text_dim": text_dim,
            "text_width": text_width,
            "text_layers": blocks("textTransEncoder.layers"),
            "text_ff": network["textTransEncoder.layers.0.linear1.weight"].shape[0],
            "positions": network["sequence_embedding"].shape[0],
        }
    except KeyError as error:
        raise CheckpointError(
            explain(f"a tensor {error}", "none", "released MotionDiffuse", "Check which file this is.")
        ) from error


def _agree(opt: Mapping[str, str], sizes: Mapping[str, int], features: int, mean: Tensor, std: Tensor) -> None:
    """Compare what opt.txt and the statistics say with what the tensors have.

    Raises:
        CheckpointError: naming everything that contradicts.
    """
    told = {d: name for name, (d, _) in _DATASETS.items()}
    named = {"latent_dim": "latent_dim", "num_layers": "layers", "ff_size": "ff", "num_text_layers": "text_layers",
             "text_latent_dim": "text_width", "text_ff_size": "text_ff"}  # fmt: skip
    rules = [
        *(
            (
                opt.get(name, str(sizes[field])) == str(sizes[field]),
                f"opt.txt {name}={opt.get(name)}, tensors {sizes[field]}",
            )
            for name, field in named.items()
        ),
        (sizes["text_dim"] == TOKEN_DIM, f"text_pre_proj reads {sizes['text_dim']} features, CLIP gives {TOKEN_DIM}"),
        (features in told, f"joint_embed reads {features} features, neither 263 (t2m) nor 251 (kit)"),
        (
            opt.get("dataset_name", told.get(features)) == told.get(features),
            f"opt.txt dataset_name={opt.get('dataset_name')}, but joint_embed reads {features} features",
        ),
        (len(mean) == features, f"mean.npy has {len(mean)} values, joint_embed reads {features} features"),
        (len(std) == features, f"std.npy has {len(std)} values, joint_embed reads {features} features"),
        # Another attention, another text side under the same or fewer names.
        (opt.get("no_eff", "False") == "False", "opt.txt no_eff=True: softmax attention, which is not supported"),
        (opt.get("no_clip", "False") == "False", "opt.txt no_clip=True: its own text encoder, which is not supported"),
    ]
    problems = [text for holds, text in rules if not holds]
    if problems:
        raise CheckpointError(
            explain(
                "settings, statistics and tensors of one published model",
                "; ".join(problems),
                "released MotionDiffuse",
                "Keep the files of one release together.",
            )
        )
