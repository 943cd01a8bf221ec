"""Released HY-Motion files: latest.ckpt, config.yml and the statistics arrays; and low-rank adapters trained on them.

The checkpoint nests `model_state_dict`: the network below "motion_transformer.", the learned features of the empty
caption and of a source token, and mean and std of the 201 features. Letters: D features of the state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.types import Representation
from motionrft.generators.base import Generator
from motionrft.generators.hymotion_network import FPS_MODES, FULL, LITE, HYMotionConfig
from motionrft.generators.released import ReleasedFormat, ReleasedGenerator, renamed

PREFIX = "motion_transformer."
_NULL = ("null_vtxt_feat", "null_ctxt_input")
_SOURCE = ("special_game_vtxt_feat", "special_game_ctxt_feat")
_STATISTICS = ("mean", "std")
_OUTSIDE = (*_NULL, *_SOURCE, *_STATISTICS)
_FPS, _OUTPUT_FPS, _BAND_S = 30.0, 20.0, 2.0
_CHECK = "Check which released file this is."
TRANSLATIONS = ("pelvis", "smpl")

_DEFAULTS: dict[str, Any] = {
    "narrowband_length": _BAND_S,
    "insert_start_token": False,
    "with_long_skip_connection": False,
    "mlp_act_type": "gelu_tanh",
    "norm_type": "layer",
    "qk_norm_type": "rms",
    "qkv_bias": True,
    "final_layer_cfg": {"act_type": "silu"},
}
"""Settings that published files leave at the defaults of the released code; here they are not choices."""


class HYMotionFormat(ReleasedFormat):
    """HY-Motion-1.0 and -Lite as published."""

    family = "hymotion"
    text = "latest.ckpt of HY-Motion-1.0 or -Lite, or its folder with config.yml and stats/"
    licence = "Tencent HY community licence: read its territory and use restrictions before using these weights"
    options = {  # noqa: RUF012
        "fps_mode": "resample (default): 30 frames per second become 20; upstream: 30 are taken for 20",
        "translation": "pelvis (default), or smpl: leave the body's own origin, as the released fine-tuning code does",
    }

    def patterns(self) -> Mapping[str, tuple[str, ...]]:
        """Return role -> glob patterns."""
        return {
            "weights": ("latest.ckpt", "*.ckpt"),
            "config": ("config.yml", "config.yaml"),
            "mean": ("stats/Mean.npy", "Mean.npy"),
            "std": ("stats/Std.npy", "Std.npy"),
        }

    def read(self, files: Mapping[str, Any], options: Mapping[str, str]) -> ReleasedGenerator:
        """Return the model; sizes come from the tensors, and everything beside them must agree."""
        tensors = files["weights"].get("model_state_dict")
        if not isinstance(tensors, Mapping):
            raise CheckpointError(
                explain("a mapping 'model_state_dict'", f"keys {sorted(files['weights'])[:8]}", "latest.ckpt", _CHECK)
            )
        network, outside = renamed(tensors, PREFIX, _OUTSIDE, "latest.ckpt")
        missing = sorted(set(_OUTSIDE) - set(outside))
        if missing:
            raise CheckpointError(explain("features and statistics", f"no {missing}", "latest.ckpt", _CHECK))
        network |= {name: tensors[name] for name in _NULL}
        kept = (*_SOURCE, *_STATISTICS) if len(tensors["mean"]) == FULL.features else _STATISTICS
        frozen = {name: tensors[name] for name in kept}  # small models have no source features
        config = _settings_of(files.get("config"))
        model = _with_options(_sizes(network, config), options)
        left = _check_settings(config, model)
        _check_statistics(files, frozen)
        mean, std = _motion_statistics(frozen, model)
        names = {FULL.width: "HY-Motion-1.0", LITE.width: "HY-Motion-1.0-Lite"}
        rate = model.native_fps / _OUTPUT_FPS if model.fps_mode == "resample" else 1.0
        dropped = [name for name in files["weights"] if name != "model_state_dict"] + left
        return ReleasedGenerator(
            model,
            network,
            frozen,
            mean,
            std,
            text_encoder="hymotion:Qwen/Qwen3-8B,openai/clip-vit-large-patch14,PROMPT_FILE",
            token_dim=model.token_dim,
            pooled_dim=model.pooled_dim,
            max_frames=int(model.train_frames / rate),
            fps=_OUTPUT_FPS,
            sampling_steps=_number(config, "infer_noise_scheduler_cfg", "validation_steps", 50),
            guidance=_number(config, "test_cfg", "text_guidance_scale", 5.0),
            solver="euler",
            dropped=tuple(dropped),
            variant=names.get(model.width, "hymotion"),
        )

    def write(self, generator: Generator) -> dict[str, Any]:
        """Return checkpoint, settings and statistics under their published names."""
        model: HYMotionConfig = generator.config
        network, frozen = generator.network.state_dict(), generator.frozen.state_dict()
        sources = {
            name: frozen.get(name, torch.zeros_like(network[twin])) for name, twin in zip(_SOURCE, _NULL, strict=True)
        }
        tensors = {name: network.pop(name) for name in _NULL} | sources | {name: frozen[name] for name in _STATISTICS}
        tensors |= {PREFIX + name: tensor for name, tensor in network.items()}
        return {
            "latest.ckpt": {"epoch": 0, "global_step": 0, "model_state_dict": tensors},
            "config.yml": _config(model, generator.spec.guidance_scale),
            "stats/Mean.npy": frozen["mean"].double(),
            "stats/Std.npy": frozen["std"].double(),
        }


def _sizes(network: Mapping[str, Tensor], config: Mapping[str, Any]) -> HYMotionConfig:
    """Return the configuration: sizes as the tensors have them, and from the settings what tensors cannot tell."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in network:
            raise CheckpointError(explain(f"a tensor {PREFIX}{name}", "none", "latest.ckpt", _CHECK))
        return tuple(network[name].shape)

    def count(prefix: str) -> int:
        return len({match[1] for name in network if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})

    width, features = shape("input_encoder.weight")
    if features not in (Representation.ROTATION.dim, FULL.features):
        raise CheckpointError(explain("a state of 201 or 135 features", str(features), "latest.ckpt", _CHECK))
    settings, pipeline = config.get("network_module_args", {}), config.get("train_pipeline_args", {})
    return replace(
        FULL,
        width=width,
        heads=width // shape("double_blocks.0.motion_q_norm.weight")[0],
        double_blocks=count("double_blocks"),
        single_blocks=count("single_blocks"),
        refiner_blocks=count("text_refiner.individual_token_refiner.blocks"),
        mlp_ratio=shape("double_blocks.0.motion_mlp.fc1.weight")[0] // width,
        token_dim=shape("null_ctxt_input")[2],
        pooled_dim=shape("null_vtxt_feat")[2],
        joint_positions=features == FULL.features,
        train_frames=pipeline.get("train_frames", FULL.train_frames),
        band_frames=round(_FPS * settings.get("narrowband_length", _BAND_S)),
    )


def _with_options(model: HYMotionConfig, options: Mapping[str, str]) -> HYMotionConfig:
    mode, origin = options.get("fps_mode") or FPS_MODES[0], options.get("translation") or TRANSLATIONS[0]
    for name, value, known in (("fps_mode", mode, FPS_MODES), ("translation", origin, TRANSLATIONS)):
        if value not in known:
            raise ConfigError(explain(f"one of {known}", repr(value), f"option {name}", "Correct it."))
    return replace(model, fps_mode=mode, rest_pelvis=model.rest_pelvis if origin == "pelvis" else (0.0, 0.0, 0.0))


def _settings(model: HYMotionConfig) -> dict[str, Any]:
    """Return the network's settings as config.yml writes them."""
    settings = {
        "apply_rope_to_single_branch": False,
        "ctxt_input_dim": model.token_dim,
        "dropout": 0.0,
        "feat_dim": model.width,
        "input_dim": model.features,
        "mask_mode": "narrowband",
        "mlp_ratio": float(model.mlp_ratio),
        "num_heads": model.heads,
        "num_layers": model.double_blocks + model.single_blocks,
        "time_factor": 1000.0,
        "vtxt_input_dim": model.pooled_dim,
    }
    if model.band_frames != FULL.band_frames:  # published files leave it at its default
        settings["narrowband_length"] = model.band_frames / _FPS
    return settings


def _config(model: HYMotionConfig, guidance: float) -> dict[str, Any]:
    """Return config.yml: what the released code needs to build the same network.

    Raises:
        ConfigError: sizes that it cannot express.
    """
    fixed = (model.output, model.pooled_gain) == (FULL.output, FULL.pooled_gain)
    if model.single_blocks != 2 * model.double_blocks or not fixed:
        expected = "output velocity, pooled_gain 1, and twice as many single as double blocks"
        got = f"{model.output}, {model.pooled_gain:g}, {model.single_blocks} and {model.double_blocks} blocks"
        do = "The published settings cannot say anything else."
        raise ConfigError(explain(expected, got, "export of hymotion", do))
    return {
        "network_module": "hymotion/network/hymotion_mmdit.HunyuanMotionMMDiT",
        "network_module_args": _settings(model),
        "train_pipeline": "hymotion/pipeline/motion_diffusion.MotionFlowMatching",
        "train_pipeline_args": {
            "enable_ctxt_null_feat": True,
            "enable_special_game_feat": True,
            "infer_noise_scheduler_cfg": {"validation_steps": 50},
            "mean_std_dir": "./stats/",
            "noise_scheduler_cfg": {"method": "euler"},
            "output_mesh_fps": 30,
            "test_cfg": {"text_guidance_scale": guidance},
            "text_encoder_cfg": {"llm_type": "qwen3", "max_length_llm": 128},
            "text_encoder_module": "hymotion/network/text_encoders/text_encoder.HYTextModel",
            "train_frames": model.train_frames,
        },
    }


def _settings_of(content: Any) -> Mapping[str, Any]:
    """Return config.yml as data; module paths in it are names and nothing is imported.

    Raises:
        CheckpointError: other sections than the published ones.
    """
    if content is None:
        return {}
    sections = ("network_module_args", "train_pipeline_args")
    if not isinstance(content, Mapping) or not all(isinstance(content.get(name), Mapping) for name in sections):
        raise CheckpointError(explain(f"sections {sections}", type(content).__name__, "config.yml", _CHECK))
    return content


def _number(config: Mapping[str, Any], group: str, name: str, default: Any) -> Any:
    """Return one of the sampling settings; absent ones are as published."""
    return config.get("train_pipeline_args", {}).get(group, {}).get(name, default)


def _check_settings(config: Mapping[str, Any], model: HYMotionConfig) -> list[str]:
    """Compare config.yml with tensors and code; return names of settings that say nothing about the network.

    Raises:
        CheckpointError: naming every setting of the network that disagrees or is unknown.
    """
    wanted = _DEFAULTS | _settings(model) | {"output_dim": model.features}
    refiner = {"num_layers": model.refiner_blocks}
    problems = []
    for name, value in config.get("network_module_args", {}).items():
        if name == "text_refiner_cfg":
            problems += [f"{name}.{key} {got!r}" for key, got in value.items() if refiner.get(key, got) != got]
        elif name not in wanted or wanted[name] != value:
            right = f"instead of {wanted[name]!r}" if name in wanted else "is unknown"
            problems.append(f"{name} {value!r} {right}")
    fps = config.get("train_pipeline_args", {}).get("output_mesh_fps", _FPS)
    if fps != _FPS:
        problems.append(f"output_mesh_fps {fps!r} instead of {_FPS:g}")
    if problems:
        do = "Use the file beside the weights."
        raise CheckpointError(explain("settings of this network", "; ".join(problems[:8]), "config.yml", do))
    known = _config(replace(model, single_blocks=2 * model.double_blocks), 5.0)["train_pipeline_args"]
    return [f"config.yml: {name}" for name in config.get("train_pipeline_args", {}) if name not in known]


def _check_statistics(files: Mapping[str, Any], frozen: Mapping[str, Tensor]) -> None:
    """Compare the arrays, if they are there, with what the checkpoint holds (float64 rounded to float32).

    Raises:
        CheckpointError: they differ: then nobody knows what the weights were trained with.
    """
    for name in _STATISTICS:
        array = files.get(name)
        if array is not None and not (array.shape == frozen[name].shape and torch.equal(array.float(), frozen[name])):
            raise CheckpointError(
                explain(
                    "the statistics in the checkpoint", "other numbers", f"stats: {name}", "Use the published ones."
                )
            )


def _motion_statistics(frozen: Mapping[str, Tensor], model: HYMotionConfig) -> tuple[Tensor, Tensor]:
    """Return mean and std (135,) of the motion as it is decoded; features that never vary get 1.

    Raises:
        CheckpointError: numbers that are not those of this layout: another one would decode to wrong motion silently.
    """
    mean, std = (frozen[name] for name in _STATISTICS)
    if not mean.shape == std.shape == (model.features,):
        got = f"shapes {tuple(mean.shape)} and {tuple(std.shape)}"
        raise CheckpointError(explain(f"{model.features} means and deviations", got, "latest.ckpt", _CHECK))
    mean, std = mean[: Representation.ROTATION.dim], std[: Representation.ROTATION.dim]
    diagonal = mean[3:].view(-1, 6).mean(0).topk(2).indices.sort().values.tolist()
    if diagonal != [0, 3] or not 0.5 < float(mean[1]) < 1.5:
        got = f"height {float(mean[1]):.2f} m, largest of six at {diagonal}"
        expected = "a translation about 1.1 m high and rotations as interleaved columns (largest of six at [0, 3])"
        raise CheckpointError(explain(expected, got, "latest.ckpt: mean", _CHECK))
    moved = mean + pad(torch.tensor(model.rest_pelvis), (0, len(mean) - 3))
    return moved, torch.where(std > 0, std, 1.0)


# -------------------------------------------------------------------------------------------------- adapters


def lora_from_released(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return adapter tensors as `generators.lora` names them, of {module: {lora_A (r, in), lora_B (out, r)}}.

    Module names are relative to "motion_transformer". The files do not say the scale: it was 16 / 8 in the released
    fine-tuning code.

    Raises:
        CheckpointError: something else below a module's name.
    """
    result: dict[str, Tensor] = {}
    for name, parts in modules.items():
        if set(parts) != {"lora_A", "lora_B"} or parts["lora_A"].shape[0] != parts["lora_B"].shape[1]:
            got = {key: tuple(value.shape) for key, value in parts.items()}
            raise CheckpointError(explain("lora_A (r, in) and lora_B (out, r)", str(got), name, _CHECK))
        result |= {f"{name.removeprefix(PREFIX)}.{key}.weight": value for key, value in parts.items()}
    return result


def lora_to_released(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return {module: {lora_A, lora_B}} of adapter tensors. Inverse of `lora_from_released`."""
    result: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, part, _ = name.rsplit(".", 2)
        result.setdefault(module, {})[part] = tensor
    return result


__all__ = ["PREFIX", "HYMotionFormat", "lora_from_released", "lora_to_released"]
