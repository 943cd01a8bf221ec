"""Released HY-Motion folders: what is read, what must agree, what is written back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.generators.hymotion import FULL
from motionrft.generators.hymotion_released import HYMotionFormat, lora_from_released, lora_to_released
from motionrft.generators.registry import FORMATS
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.recipes.released_generator import GeneratorImport, export_generator, import_generator
from motionrft.training.released import read_content, write_released
from tests.hymotion_fixtures import POOLED, RELEASED, TOKENS, make

# As published in all but width; 36 model frames are 24 frames of motion.
TINY = replace(RELEASED, train_frames=36, min_frames=20, mlp_ratio=4, band_frames=60, rest_pelvis=FULL.rest_pelvis)
FORMAT = HYMotionFormat()


@pytest.fixture(scope="module")
def contents() -> dict[str, Any]:
    """Return what the four files of a published folder hold."""
    generator = make(TINY, max_frames=24)
    for name in ("special_game_vtxt_feat", "special_game_ctxt_feat"):
        generator.frozen.get_buffer(name).normal_(generator=torch.Generator().manual_seed(1))
    return FORMAT.write(generator)


def write(folder: Path, contents: dict[str, Any], change: Callable[[dict[str, Any]], object] = lambda c: None) -> Path:
    """Write the files after `change` was applied to a copy of their settings."""
    copied = {**contents, "config.yml": {k: dict(v) if isinstance(v, dict) else v
                                         for k, v in contents["config.yml"].items()}}  # fmt: skip
    change(copied)
    write_released(folder, copied)
    return folder


def bring(folder: Path, out: Path, **options: str):
    return import_generator(FORMATS["hymotion"], folder, out, GeneratorImport(options=options))


def test_a_folder_becomes_a_model_and_the_same_folder_again(contents: dict[str, Any], tmp_path: Path) -> None:
    source = write(tmp_path / "published", contents)
    imported = bring(source, tmp_path / "model")
    found, spec = imported.found, imported.generator.spec
    assert found.model == replace(TINY, token_dim=TOKENS, pooled_dim=POOLED)
    assert (spec.fps, spec.max_frames, spec.guidance_scale, found.sampling_steps) == (20.0, 24, 2.5, 50)
    assert set(found.dropped) == {"epoch", "global_step"}
    loaded = load_generator(tmp_path / "model")
    tensors = contents["latest.ckpt"]["model_state_dict"]
    assert loaded.state_shape(24) == (36, 201)
    # The statistics of the motion are those of its pelvis; the checkpoint's are those of the body's origin.
    torch.testing.assert_close(loaded.normalizer.mean[:3], tensors["mean"][:3] + torch.tensor(FULL.rest_pelvis))
    assert torch.equal(loaded.normalizer.mean[3:], tensors["mean"][3:135])

    export_generator(FORMAT, tmp_path / "model", tmp_path / "back")
    for name in contents:
        first, again = read_content(source / name), read_content(tmp_path / "back" / name)
        if name == "latest.ckpt":
            first, again = first["model_state_dict"], again["model_state_dict"]
            assert list(first) == list(again) and all(torch.equal(first[n], again[n]) for n in first)
        else:
            assert torch.equal(first, again) if name.endswith(".npy") else first == again


def test_the_weight_file_alone_is_enough(contents: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "lone", {"latest.ckpt": contents["latest.ckpt"], "config.yml": {}}, lambda c: c.pop("config.yml"))
    model = FORMAT.read({"weights": contents["latest.ckpt"]}, {}).model
    assert model.train_frames == 360  # only the settings say otherwise
    assert bring(tmp_path / "lone" / "latest.ckpt", tmp_path / "model").found.max_frames == 240


def test_options_choose_rates_and_origin(contents: dict[str, Any], tmp_path: Path) -> None:
    files = {"weights": contents["latest.ckpt"], "config": contents["config.yml"]}
    found = FORMAT.read(files, {"fps_mode": "upstream", "translation": "smpl"})
    assert found.model.fps_mode == "upstream" and found.max_frames == 36 and found.fps == 20.0
    assert found.model.rest_pelvis == (0, 0, 0)
    assert torch.equal(found.mean, contents["latest.ckpt"]["model_state_dict"]["mean"][:135])
    for name in FORMAT.options:
        with pytest.raises(ConfigError, match=name):
            FORMAT.read(files, {name: "wrong"})


@pytest.mark.parametrize(
    ("section", "setting", "value", "message"),
    [
        ("network_module_args", "feat_dim", 17, r"feat_dim 17 instead of 16"),
        ("network_module_args", "num_heads", 4, r"num_heads 4 instead of 2"),
        ("network_module_args", "time_factor", 1.0, r"time_factor 1\.0 instead of 1000\.0"),
        ("network_module_args", "apply_rope_to_single_branch", True, r"apply_rope_to_single_branch"),
        ("network_module_args", "qk_norm_type", "layer", r"qk_norm_type 'layer'"),
        ("network_module_args", "text_refiner_cfg", {"num_layers": 3}, r"num_layers 3"),
        ("network_module_args", "dropout_path", 0.1, r"dropout_path 0\.1 is unknown"),
        ("train_pipeline_args", "output_mesh_fps", 20, r"output_mesh_fps 20"),
    ],
)
def test_settings_that_disagree_with_tensors_or_code_are_refused(
    contents: dict[str, Any], tmp_path: Path, section: str, setting: str, value: Any, message: str
) -> None:
    folder = write(tmp_path / "p", contents, lambda c: c["config.yml"][section].update({setting: value}))
    with pytest.raises(CheckpointError, match=message):
        bring(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_settings_that_only_tensors_cannot_tell_are_taken(contents: dict[str, Any], tmp_path: Path) -> None:
    def change(c: dict[str, Any]) -> None:
        c["config.yml"]["network_module_args"] |= {"narrowband_length": 0.2, "qkv_bias": True}
        c["config.yml"]["train_pipeline_args"] |= {"losses_cfg": {"anything": 1}}

    found = bring(write(tmp_path / "p", contents, change), tmp_path / "model").found
    assert found.model.band_frames == 6 and "config.yml: losses_cfg" in found.dropped


def test_statistics_must_be_those_of_the_checkpoint_and_of_this_layout(
    contents: dict[str, Any], tmp_path: Path
) -> None:
    other = write(tmp_path / "other", contents, lambda c: c.update({"stats/Std.npy": c["stats/Std.npy"] * 1.001}))
    with pytest.raises(CheckpointError, match="stats: std"):
        bring(other, tmp_path / "model")
    tensors = dict(contents["latest.ckpt"]["model_state_dict"])
    mean = tensors["mean"].clone()
    mean[3:135] = mean[3:135].view(22, 6)[:, [0, 3, 1, 4, 2, 5]].flatten()  # columns one after the other
    for wrong, message in ((mean, r"interleaved.*\[0, 1\]"), (0 * mean, "height 0.00"), (mean[:135], "201 means")):
        with pytest.raises(CheckpointError, match=message):
            FORMAT.read({"weights": {"model_state_dict": tensors | {"mean": wrong}}}, {})


def test_wrong_tensors_are_listed_together(contents: dict[str, Any], tmp_path: Path) -> None:
    tensors = dict(contents["latest.ckpt"]["model_state_dict"])
    tensors["motion_transformer.single_blocks.1.linear1.weight"] = torch.zeros(3, 3)
    del tensors["motion_transformer.final_layer.linear.bias"]
    changed = {**contents, "latest.ckpt": {"model_state_dict": tensors}}
    with pytest.raises(CheckpointError, match=r"(?s)final_layer\.linear\.bias.*linear1\.weight"):
        bring(write(tmp_path / "p", changed), tmp_path / "model")
    with pytest.raises(CheckpointError, match="model_state_dict"):
        FORMAT.read({"weights": {"state_dict": tensors}}, {})


def test_models_that_the_format_cannot_express_are_not_exported() -> None:
    for change in ({"single_blocks": 1}, {"output": "clean"}, {"pooled_gain": 2.0}):
        with pytest.raises(ConfigError, match="pooled_gain 1, and twice as many"):
            FORMAT.write(make(replace(TINY, **change), max_frames=24))


def test_a_small_model_of_135_features_is_exported_with_its_own_frames() -> None:
    generator = make(replace(TINY, joint_positions=False, native_fps=20.0, band_frames=12))
    files = FORMAT.write(generator)
    assert files["config.yml"]["network_module_args"]["narrowband_length"] == 0.4
    assert (files["latest.ckpt"]["model_state_dict"]["special_game_ctxt_feat"] == 0).all()
    assert files["stats/Mean.npy"].shape == (135,)


def test_adapter_files_must_hold_pairs_that_fit() -> None:
    pair = {"lora_A": torch.ones(2, 5), "lora_B": torch.ones(7, 2)}
    state = lora_from_released({"double_blocks.0.text_qkv": pair})
    assert {n: tuple(t.shape) for n, t in state.items()} == {
        "double_blocks.0.text_qkv.lora_A.weight": (2, 5),
        "double_blocks.0.text_qkv.lora_B.weight": (7, 2),
    }
    assert lora_to_released(state)["double_blocks.0.text_qkv"]["lora_B"] is pair["lora_B"]
    for wrong in ({"lora_A": torch.ones(2, 5)}, {"lora_A": torch.ones(2, 5), "lora_B": torch.ones(7, 3)}):
        with pytest.raises(CheckpointError, match="text_qkv"):
            lora_from_released({"double_blocks.0.text_qkv": wrong})
