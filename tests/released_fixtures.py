"""MotionReward files in the released format with random weights, and the arrays that lie beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrft.core.rng import generator, numpy_rng
from motionrft.core.types import Representation
from motionrft.data.normalizers import ARRAY_FILES
from motionrft.reward.checkpoint_keys import adapter_rules, backbone_rules, to_released
from motionrft.reward.config import MotionRewardConfig
from motionrft.reward.released import file_names, model_config_of
from tests.reward_fixtures import TINY, make_adapted, make_backbone

SMALL = replace(TINY, text_time=True, decoder_layers=3, time_token="none_when_clean", text_token_dim=1024)
RANK, ALPHA = 2, 5  # scale 2.5: a fixed scale of 2 would show


def write_statistics(folder: Path) -> Path:
    """Write the six arrays a HumanML3D folder keeps, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for representation, names in ARRAY_FILES.items():
        width = 3 if representation is Representation.JOINT else representation.dim
        rng = numpy_rng("released-statistics", representation.value)
        np.save(folder / names[0], rng.standard_normal(width))
        np.save(folder / names[1], 0.5 + rng.uniform(size=width))
    return folder


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Return 0.1 times normal float32 tensors: none is zero, so that a tensor left out changes something."""
    rng = generator("released-tensors", seed)
    return {name: 0.1 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def released_contents(config: MotionRewardConfig = SMALL, seed: int = 0, rank: int = RANK) -> dict[str, dict[str, Any]]:
    """Return part -> content of the five files, with numpy scalars among the metrics of the last stage."""
    backbone = make_backbone(config, seed)
    adapted = make_adapted(backbone, seed, rank)
    contents: dict[str, dict[str, Any]] = {
        "backbone": {
            "state_dict": to_released(backbone.state_dict(), backbone_rules(config)),
            "epoch": 49,
            "metrics": {"r1": 0.5, "epoch": 49},
            "model_config": model_config_of(config),
        }
    }
    for name, score in (("preference", 0.86), ("authenticity", np.float64(0.95))):
        state = adapted.adapter_state(name)
        about = {"epoch": 7, "metrics": {"score": score}}
        lora = to_released(state, adapter_rules(config, name))
        head = {n.removeprefix("head/"): t for n, t in state.items() if n.startswith("head/")}
        contents[f"{name}/lora"] = {"lora_state_dict": lora, "lora_rank": rank, "lora_alpha": ALPHA, **about}
        contents[f"{name}/head"] = {"state_dict": head, **about}
    return contents


def write_files(
    folder: Path,
    contents: dict[str, dict[str, Any]],
    suffix: str = "",
    change: Callable[[dict[str, dict[str, Any]]], object] = lambda contents: None,
) -> Path:
    """Write the files after `change` was applied to their contents, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    change(contents)
    for part, name in file_names(suffix).items():
        if part in contents:
            torch.save(contents[part], folder / name)
    return folder
