"""Names of CLIP's text tower: OpenAI's, which lie in MotionDiffuse checkpoints below `clip.`, and Hugging Face's.

The towers are the same. OpenAI packs query, key and value in one matrix, in this order, and multiplies by the
projection from the right; Hugging Face has three matrices and a Linear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, explain

_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PROJECTION = "text_projection"
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
# The image tower, the temperature, and the sizes that archives of the original carry along.
_OTHER = ("visual.", "logit_scale", "input_resolution", "context_length", "vocab_size")


def from_openai(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict of the library's `CLIPTextModelWithProjection`.

    Args:
        tensors: state dict with OpenAI's names below `prefix` ("clip." in MotionDiffuse); others are left out, and so
            is what is not of the text tower.
        prefix: of the names.

    Raises:
        CheckpointError: names of a text tower are missing, or unknown ones are there.
    """
    ours = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    ours = {n: t for n, t in ours.items() if not n.startswith(_OTHER)}
    num_blocks = 1 + max((int(found[1]) for found in map(_BLOCK.match, ours) if found), default=0)
    expected = _openai_names(num_blocks)
    missing, unknown = sorted(set(expected) - set(ours)), sorted(set(ours) - set(expected))
    if missing or unknown:
        raise CheckpointError(
            explain(
                f"the {len(expected)} tensors of a CLIP text tower with {num_blocks} blocks below {prefix!r}",
                f"missing {missing[:3]}, unknown {unknown[:3]}",
                "CLIP in OpenAI's names",
                "Check which file this is.",
            )
        )
    state = {}
    for name, theirs in expected.items():
        if name == _PROJECTION:
            state[theirs[0]] = ours[name].T.contiguous()
        else:
            for part, target in zip(ours[name].chunk(len(theirs)), theirs, strict=True):
                state[target] = part.clone()  # views of one matrix could not be stored as several
    return state


def to_openai(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return OpenAI's names below `prefix` of a `CLIPTextModelWithProjection`'s state dict.

    Raises:
        CheckpointError: names are missing, or unknown ones are there.
    """
    num_blocks = len({n.split(".")[3] for n in state if n.startswith("text_model.encoder.layers.")})
    expected = _openai_names(num_blocks)
    names = {target for theirs in expected.values() for target in theirs}
    missing, unknown = sorted(names - set(state)), sorted(set(state) - names)
    if missing or unknown or not num_blocks:
        raise CheckpointError(
            explain(
                f"the {len(names)} tensors of a CLIPTextModelWithProjection",
                f"missing {missing[:3]}, unknown {unknown[:3]}",
                "CLIP in Hugging Face's names",
                "Give the state dict of that class.",
            )
        )
    tensors = {name: torch.cat([state[target] for target in theirs]) for name, theirs in expected.items()}
    tensors[_PROJECTION] = tensors[_PROJECTION].T.contiguous()
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _openai_names(num_blocks: int) -> dict[str, tuple[str, ...]]:
    """Return OpenAI's name -> Hugging Face's, which are three where a matrix packs query, key and value."""
    names: dict[str, tuple[str, ...]] = {name: (theirs,) for name, theirs in _ENDS.items()}
    names[_PROJECTION] = ("text_projection.weight",)
    for block in range(num_blocks):
        source, target = f"transformer.resblocks.{block}", f"text_model.encoder.layers.{block}"
        for kind in ("weight", "bias"):
            names[f"{source}.attn.in_proj_{kind}"] = tuple(f"{target}.self_attn.{x}_proj.{kind}" for x in "qkv")
            for part, theirs in _PARTS.items():
                names[f"{source}.{part}.{kind}"] = (f"{target}.{theirs}.{kind}",)
    return names
