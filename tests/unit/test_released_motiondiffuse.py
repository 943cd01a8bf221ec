"""Released MotionDiffuse files: nesting, statistics, settings, and the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.protocols import GeneratorSpec
from motionrft.core.types import Representation
from motionrft.generators.base import Build
from motionrft.generators.motiondiffuse import OFFICIAL, MotionDiffuseConfig, MotionDiffuseGenerator
from motionrft.generators.motiondiffuse_released import MotionDiffuseReleased, clip_names
from motionrft.representations.normalize import Normalizer
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.recipes.released_generator import GeneratorImport, export_generator, import_generator
from motionrft.training.released import read_content, write_released

KIND = Representation.KINEMATIC
FORMAT = MotionDiffuseReleased()
TINY = replace(OFFICIAL, latent_dim=16, layers=2, heads=2, ff=24, text_width=8, text_layers=1, text_heads=2, text_ff=12)


def make(config: MotionDiffuseConfig = TINY, features: int = 263, **changes: Any) -> MotionDiffuseGenerator:
    torch.manual_seed(0)
    statistics = Normalizer(torch.randn(features), torch.rand(features) + 0.1, KIND)
    spec = replace(GeneratorSpec("motiondiffuse", KIND, 20.0, 196, "text", "eps", 1000, 1.0), **changes)
    return MotionDiffuseGenerator(Build(spec, statistics, config.text_dim, 0), config)


def files_of(generator: MotionDiffuseGenerator) -> dict[str, Any]:
    files = FORMAT.write(generator)
    roles = {"weights": "model/latest.tar", "mean": "meta/mean.npy", "std": "meta/std.npy", "opt": "opt.txt"}
    return {role: files[name] for role, name in roles.items()}


def test_what_is_written_reads_back_as_the_same_model_with_its_statistics() -> None:
    first = make(train_steps=500)
    found = FORMAT.read(files_of(first), {})
    assert found.model == TINY and (found.train_steps, found.guidance, found.solver) == (500, 1.0, "ddpm")
    assert set(found.dropped) == {"opt_encoder", "ep", "total_it"} and found.variant == "t2m 500 steps"
    assert torch.equal(found.mean, first.normalizer.mean) and torch.equal(found.std, first.normalizer.std)
    second = make(found.model)
    second.network.load_state_dict(dict(found.network), strict=True)
    for name, value in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value)


def test_clip_is_left_out_whatever_its_precision_and_said_so() -> None:
    files = files_of(make())
    clip = {name: torch.zeros(1, dtype=torch.float16) for name in clip_names()}
    weights = {**files["weights"], "encoder": {**files["weights"]["encoder"], **clip}}
    found = FORMAT.read({**files, "weights": weights}, {})
    assert not any(name.startswith("clip.") for name in found.network)
    assert set(clip_names()) < set(found.dropped) and len(set(clip_names())) == 302
    note = FORMAT.write(make())["model/not_included.txt"]
    assert "openai/clip-vit-base-patch32" in note and note.count("\nclip.") == 302


def test_without_settings_the_published_ones_hold_and_statistics_may_be_wide() -> None:
    files = files_of(make(replace(TINY, heads=8, text_heads=4), features=251))
    del files["opt"]
    files |= {"mean": files["mean"].double(), "std": files["std"].double()[None]}
    found = FORMAT.read(files, {})
    assert (found.model.heads, found.model.text_heads, found.train_steps) == (8, 4, 1000)
    assert found.fps == 12.5 and found.std.shape == (251,) and found.std.dtype == torch.float32


def test_missing_parts_are_named() -> None:
    files = files_of(make())
    with pytest.raises(CheckpointError, match="no mean, std"):
        FORMAT.read({"weights": files["weights"]}, {})
    with pytest.raises(CheckpointError, match="'encoder'"):
        FORMAT.read({**files, "weights": files["weights"]["encoder"]}, {})
    weights = dict(files["weights"]["encoder"])
    del weights["joint_embed.weight"]
    with pytest.raises(CheckpointError, match=r"joint_embed\.weight"):
        FORMAT.read({**files, "weights": {"encoder": weights}}, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("latent_dim: 512", "latent_dim=512, tensors 16"),
        ("num_layers: 8", "num_layers=8, tensors 2"),
        ("dataset_name: kit", "dataset_name=kit, but joint_embed reads 263"),
        ("no_eff: True", "no_eff"),
        ("no_clip: True", "no_clip"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(line: str, message: str) -> None:
    files = files_of(make())
    with pytest.raises(CheckpointError, match=message):
        FORMAT.read({**files, "opt": f"{files['opt']}\n{line}\n"}, {})


def test_statistics_of_another_width_are_refused() -> None:
    files = files_of(make())
    with pytest.raises(CheckpointError, match=r"std\.npy has 251 values, joint_embed reads 263"):
        FORMAT.read({**files, "std": torch.ones(251)}, {})


def test_models_that_the_published_code_cannot_build_are_not_exported() -> None:
    with pytest.raises(ConfigError, match=r"384 features, CLIP's 512"):
        FORMAT.write(make(replace(TINY, text_dim=384)))
    with pytest.raises(ConfigError, match="target='velocity'"):
        FORMAT.write(make(replace(TINY, target="velocity")))
    with pytest.raises(ConfigError, match="guidance 2"):
        FORMAT.write(make(replace(TINY, text_dropout=0.1), guidance_scale=2.0))


@pytest.mark.parametrize("given", ["", "model/latest.tar"])
def test_files_are_imported_with_their_own_statistics_and_exported_again(tmp_path: Path, given: str) -> None:
    first, published = make(), tmp_path / "published"
    write_released(published, FORMAT.write(first))
    others = Normalizer(torch.zeros(263), torch.ones(263), KIND)
    import_generator(FORMAT, published / given, tmp_path / "model", GeneratorImport(normalizers={KIND: others}))
    model = load_generator(tmp_path / "model")
    assert model.config == TINY and torch.equal(model.normalizer.std, first.normalizer.std)
    assert (model.spec.text_encoder.split(":")[0], model.spec.sampling_steps) == ("clip-tokens", 1000)
    export_generator(FORMAT, tmp_path / "model", tmp_path / "again")
    before, after = (read_content(folder / "model" / "latest.tar") for folder in (published, tmp_path / "again"))
    assert list(before["encoder"]) == list(after["encoder"])
    assert all(torch.equal(tensor, after["encoder"][name]) for name, tensor in before["encoder"].items())
    for name in ("meta/mean.npy", "meta/std.npy"):
        assert torch.equal(read_content(published / name), read_content(tmp_path / "again" / name))
    for name in ("opt.txt", "model/not_included.txt"):
        assert read_content(published / name) == read_content(tmp_path / "again" / name)
