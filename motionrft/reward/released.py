"""What the released MotionReward files are called and which sizes they were made with. Reading them is done above.

Sizes follow from shapes. Head counts do not: they come from the file's `model_config` or from a preset, never from a
guess, because a wrong count loads without complaint and scores something else.

Symbols: D tower width, d latent, n blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.reward.checkpoint_keys import RELEASED_NAMES
from motionrft.reward.config import PRESETS, MotionRewardConfig, reward_preset

BACKBONE_FILE = "stage1_retrieval_backbone"
ADAPTER_FILES = {"preference": "stage2_critic", "authenticity": "stage3_ai_detection"}
"""Adapter -> file name before `_lora` and `_head`."""

TRAINED_ON = {"preference": ("kinematic", "joint", "rotation"), "authenticity": ("kinematic", "joint")}
"""Representations the published adapters were trained on; their rotation authenticity was left at its start."""

_IGNORED = ("clip.", "critic", "ai_detection", "proj_201", "final_layer_201")  # text encoder, adapters, unused class
_INFIXES = (".original_linear.", ".original_mha.")  # left by saving while adapters were injected

# Several places per size, so that one mis-shaped tensor is reported as such instead of changing what is expected.
_SIZES: dict[str, tuple[tuple[str, int], ...]] = {
    "unified_dim": (("global_motion_token", 1), ("encoder.norm.weight", 0), ("query_pos_encoder.pe", 2)),
    "latent_dim": (("global_text_token", 1), ("text_encoder.norm.weight", 0), ("query_pos_decoder.pe", 2)),
    "ff_dim": (
        ("encoder.middle_block.linear1.weight", 0),
        ("encoder.middle_block.linear1.bias", 0),
        ("decoder.middle_block.linear1.bias", 0),
    ),
    "max_positions": (("query_pos_encoder.pe", 0), ("query_text_pos_encoder.pe", 0), ("query_pos_decoder.pe", 0)),
    "text_token_dim": (("text_embedding.weight", 1),),
}
_CONFIG_FIELDS = {
    "unified_dim": "unified_dim",
    "latent_dim": "latent_dim",
    "encoder_num_layers": "num_layers",
    "encoder_ff_size": "ff_dim",
    "text_num_layers": "num_layers",
    "text_ff_size": "ff_dim",
}
"""Field of the released `model_config` -> field here."""
_HEADS = {"encoder_num_heads": "num_heads", "text_num_heads": "text_heads"}
_PRESET_FIELDS = ("unified_dim", "latent_dim", "num_layers", "decoder_layers", "ff_dim", "proj_hidden", "proj_layers")
PUBLISHED = [name for name in PRESETS if name != "quickstart"]


def file_names(suffix: str = "") -> dict[str, str]:
    """Return part -> file name: `backbone`, and `ADAPTER/lora` and `ADAPTER/head` of both adapters."""
    names = {"backbone": f"{BACKBONE_FILE}{suffix}.pth"}
    for adapter, stem in ADAPTER_FILES.items():
        names |= {f"{adapter}/{part}": f"{stem}_{part}{suffix}.pth" for part in ("lora", "head")}
    return names


def plain_names(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the backbone's tensors under their plain names, and the names left out because they are not part of it.

    Raises:
        CheckpointError: if two names become one.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_IGNORED):
            continue
        bare = name
        for infix in _INFIXES:
            bare = bare.replace(infix, ".")
        if bare in kept:
            raise CheckpointError(explain(f"one tensor {bare}", "two", where, "Give the published file."))
        kept[bare] = tensor
    return kept, sorted(n for n in tensors if n.startswith(_IGNORED))


def config_of(
    tensors: Mapping[str, Tensor], model_config: Mapping[str, Any], preset: str, time_token: str, where: str
) -> MotionRewardConfig:
    """Return the sizes of a released backbone.

    Args:
        tensors: under plain names; may still be incomplete.
        model_config: what the file says about itself; may be empty.
        preset: a published size, or "" for none.
        time_token: whether clean motion gets a time token; see `MotionRewardConfig`.
        where: the file, for messages.

    Raises:
        ConfigError: head counts are known from nowhere, or the preset contradicts the file.
        CheckpointError: `model_config` contradicts the tensors, or not all representations were trained.
    """
    sizes = _sizes_of(tensors)
    _check_model_config(model_config, sizes, where)
    known = reward_preset(preset) if preset else None
    if known is not None:
        wrong = [
            f"{n} is {sizes[n]}, {preset} has {getattr(known, n)}" for n in _PRESET_FIELDS if not _same(known, sizes, n)
        ]
        if wrong:
            raise ConfigError(explain(f"preset {preset!r} to fit", "; ".join(wrong), where, "Give another --preset."))
    heads = {}
    for theirs, ours in _HEADS.items():
        stated = [model_config[theirs]] if theirs in model_config else []
        stated += [getattr(known, ours)] if known is not None else []
        if len(set(stated)) > 1:
            raise ConfigError(
                explain(
                    f"{theirs} {stated[0]} as in model_config", f"{stated[1]} in {preset!r}", where, "Drop --preset."
                )
            )
        if stated and isinstance(stated[0], int) and stated[0] >= 1:
            heads[ours] = stated[0]
    if len(heads) < len(_HEADS):
        fitting = [n for n in PUBLISHED if all(_same(PRESETS[n], sizes, f) for f in _PRESET_FIELDS)]
        hint = f"Give --preset; these sizes fit {', '.join(fitting) or 'none of ' + ', '.join(PUBLISHED)}."
        raise ConfigError(
            explain("encoder_num_heads and text_num_heads in model_config", "not both, and no preset", where, hint)
        )
    return replace(MotionRewardConfig(text_time=True, time_token=time_token), **sizes, **heads)  # type: ignore[arg-type]


def model_config_of(config: MotionRewardConfig) -> dict[str, Any]:
    """Return what a released backbone file says about itself."""
    name = next((n for n in PUBLISHED if all(getattr(PRESETS[n], f) == getattr(config, f) for f in _PRESET_FIELDS)), "")
    stated = {theirs: getattr(config, ours) for theirs, ours in {**_CONFIG_FIELDS, **_HEADS}.items()}
    return {
        "model_size": name or "custom",
        "use_unified_dim": True,
        **stated,
        "repr_types": [RELEASED_NAMES[r] for r in config.representations],
    }


def _sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, places in _SIZES.items():
        found = [tensors[key].shape[dim] for key, dim in places if key in tensors and tensors[key].dim() > dim]
        if found:  # else the default stands, and the missing tensors are reported
            sizes[name] = Counter(found).most_common(1)[0][0]
    for name, stack in (("num_layers", "encoder"), ("decoder_layers", "decoder")):
        sizes[name] = 2 * _count(tensors, f"{stack}.input_blocks.") + 1
    linears = [
        int(parts[2])
        for key in tensors
        if len(parts := key.split(".")) == 4
        and parts[0].startswith("proj_")
        and parts[1] == "proj"
        and parts[2].isdigit()
    ]
    sizes["proj_layers"] = max(linears, default=0) // 3 + 1
    hidden = [t.shape[0] for r in RELEASED_NAMES.values() if (t := tensors.get(f"proj_{r}.proj.0.bias")) is not None]
    width = sizes.get("unified_dim", MotionRewardConfig.unified_dim)
    sizes["proj_hidden"] = Counter(hidden).most_common(1)[0][0] if hidden else width
    return sizes


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    indices = [int(i) for k in tensors if k.startswith(prefix) and (i := k[len(prefix) :].split(".")[0]).isdigit()]
    return max(indices, default=-1) + 1


def _same(preset: MotionRewardConfig, sizes: Mapping[str, int], name: str) -> bool:
    if name == "proj_hidden" and preset.proj_layers == 1:
        return True  # a single linear layer has no hidden width
    return sizes.get(name, getattr(preset, name)) == getattr(preset, name)


def _check_model_config(model_config: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    wrong = [
        f"{theirs} is {model_config[theirs]}, the tensors say {sizes[ours]}"
        for theirs, ours in _CONFIG_FIELDS.items()
        if theirs in model_config
        and ours in sizes
        and model_config[theirs] != sizes[ours]
        # without a width of its own the tower is as wide as the latent, whatever unified_dim says
        and not (theirs == "unified_dim" and model_config.get("use_unified_dim") is False)
    ]
    kinds = model_config.get("repr_types", list(RELEASED_NAMES.values()))
    untrained = sorted(set(RELEASED_NAMES.values()) - {str(k) for k in kinds})
    if untrained:
        wrong.append(f"repr_types leaves out {untrained}: their projections were never trained")
    if wrong:
        raise CheckpointError(
            explain("a model_config that agrees with the tensors", "; ".join(wrong), where, "Give the published file.")
        )
