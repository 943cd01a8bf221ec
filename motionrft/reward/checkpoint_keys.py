"""Names of the released reward weights against the names used here, in both directions and without loss.

Released attention keeps q, k, v as thirds of one matrix, representations are called 263, 22x3 and 135, and a projection
of one layer has no index. Reading files is not this module's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, explain
from motionrft.reward.config import MotionRewardConfig

RELEASED_NAMES = {"kinematic": "263", "joint": "22x3", "rotation": "135"}
RELEASED_ADAPTERS = {"preference": ("critic_", "critic_proj_"), "authenticity": ("ai_detection_", "ai_proj_")}
"""Adapter -> prefix of its encoder keys, prefix of its projection keys."""


@dataclass(frozen=True)
class KeyRule:
    """One tensor here = a piece of one released tensor."""

    ours: str
    released: str
    third: int | None = None  # which of q, k, v rows of the released tensor
    positions: bool = False  # released as (P, 1, D), kept here as (P, D)


def _blocks(num_layers: int) -> list[str]:
    half = (num_layers - 1) // 2
    outer = [f"{side}_blocks.{i}" for side in ("input", "output") for i in range(half)]
    return [*outer, "middle_block"]


def _pair(ours: str, released: str) -> Iterator[KeyRule]:
    for kind in ("weight", "bias"):
        yield KeyRule(f"{ours}.{kind}", f"{released}.{kind}")


def _attention(ours: str, released: str, cross: bool = False) -> Iterator[KeyRule]:
    for third, letter in enumerate("qkv"):
        # the cross-attention to one token keeps its idle query and key weights as buffers
        joint = "_" if cross and letter != "v" else "_proj."
        for kind in ("weight", "bias"):
            yield KeyRule(f"{ours}.{letter}{joint}{kind}", f"{released}.in_proj_{kind}", third)
    yield from _pair(f"{ours}.out_proj", f"{released}.out_proj")


def _stack(ours: str, released: str, num_layers: int, decoder: bool = False) -> Iterator[KeyRule]:
    for block in _blocks(num_layers):
        yield from _attention(f"{ours}.{block}.self_attn", f"{released}.{block}.self_attn")
        if decoder:
            yield from _attention(f"{ours}.{block}.cross_attn", f"{released}.{block}.multihead_attn", cross=True)
        for name in ("linear1", "linear2", "norm1", "norm2", *(("norm3",) if decoder else ())):
            yield from _pair(f"{ours}.{block}.{name}", f"{released}.{block}.{name}")
    for i in range((num_layers - 1) // 2):
        yield from _pair(f"{ours}.linear_blocks.{i}", f"{released}.linear_blocks.{i}")
    yield from _pair(f"{ours}.norm", f"{released}.norm")


def backbone_rules(config: MotionRewardConfig) -> list[KeyRule]:
    """Return one rule per tensor of `RewardBackbone(config)`."""
    rules = [KeyRule("motion.token", "global_motion_token"), KeyRule("text.token", "global_text_token")]
    for name in config.representations:
        other = RELEASED_NAMES[name]
        for i in range(config.proj_layers):
            index = "" if config.proj_layers == 1 else f".{3 * i}"
            rules += _pair(f"motion.proj.{name}.{3 * i}", f"proj_{other}.proj{index}")
        rules += _pair(f"decoder.final.{name}", f"final_layer_{other}")
    rules += [
        KeyRule("motion.positions.table", "query_pos_encoder.pe", positions=True),
        KeyRule("text.positions.table", "query_text_pos_encoder.pe", positions=True),
        KeyRule("decoder.positions.table", "query_pos_decoder.pe", positions=True),
        *_pair("motion.dist", "dist_layer"),
        *_pair("text.dist", "dist_text_layer"),
        *_pair("text.embed", "text_embedding"),
        *_stack("motion.encoder", "encoder", config.num_layers),
        *_stack("text.encoder", "text_encoder", config.num_layers),
        *_stack("decoder.decoder", "decoder", config.decoder_layers, decoder=True),
    ]
    for layer in ("linear_1", "linear_2"):
        rules += _pair(f"motion.time.{layer}", f"time_embedding.{layer}")
        if config.text_time:
            rules += _pair(f"text.time.{layer}", f"time_embedding_text.{layer}")
    return rules


def adapter_rules(config: MotionRewardConfig, name: str) -> list[KeyRule]:
    """Return one rule per tensor of adapter `name`; the head keeps its names under `head/`."""
    prefix, proj_prefix = RELEASED_ADAPTERS[name]
    rules = []
    for block in _blocks(config.num_layers):
        short = re.sub(r"_blocks\.", "_block_", block)
        ours = f"adapter/encoder.{block}"
        sites = [(f"{ours}.self_attn.{x}_site", f"{prefix}{short}_attn.lora_{x}") for x in "qkvo"]
        sites += [(f"{ours}.linear{i}", f"{prefix}{short}_ffn{i}.lora") for i in (1, 2)]
        rules += [KeyRule(f"{a}.lora_{m}.weight", f"{b}.lora_{m}") for a, b in sites for m in "AB"]
    for representation in config.representations:
        for i in range(config.proj_layers):
            index = "" if config.proj_layers == 1 else f"_layer{3 * i}"
            released = f"{proj_prefix}{RELEASED_NAMES[representation]}{index}.lora"
            ours = f"adapter/proj.{representation}.{3 * i}"
            rules += [KeyRule(f"{ours}.lora_{m}.weight", f"{released}.lora_{m}") for m in "AB"]
    return rules


def from_released(tensors: Mapping[str, Tensor], rules: list[KeyRule], where: str) -> dict[str, Tensor]:
    """Return the tensors under the names used here.

    Raises:
        CheckpointError: if a name is missing or unknown.
    """
    expected = {rule.released for rule in rules}
    problems = [f"missing {n}" for n in sorted(expected - tensors.keys())]
    problems += [f"unknown {n}" for n in sorted(tensors.keys() - expected)]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(explain(f"{len(expected)} released tensors", shown, where, "Check preset and file."))
    result = {}
    for rule in rules:
        tensor = tensors[rule.released]
        if rule.third is not None:
            tensor = tensor.chunk(3)[rule.third]
        result[rule.ours] = (tensor[:, 0] if rule.positions else tensor).clone()
    return result


def to_released(state: Mapping[str, Tensor], rules: list[KeyRule]) -> dict[str, Tensor]:
    """Return the tensors under their released names: the inverse of `from_released`."""
    thirds: dict[str, dict[int, Tensor]] = {}
    result: dict[str, Tensor] = {}
    for rule in rules:
        tensor = state[rule.ours]
        if rule.third is not None:
            thirds.setdefault(rule.released, {})[rule.third] = tensor
        else:
            result[rule.released] = tensor[:, None].clone() if rule.positions else tensor.clone()
    return result | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}
