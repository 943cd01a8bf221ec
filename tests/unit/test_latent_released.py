"""Released files of MLD and MotionLCM: what is read, left out, refused, and written back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.generators.mld import LatentGenerator
from motionrft.generators.mld_released import MLDFormat, MotionLCMFormat
from motionrft.generators.registry import FAMILIES, FORMATS
from motionrft.nn.text import load_text_encoder
from motionrft.representations.normalize import Normalizer
from motionrft.training.recipes.released_generator import GeneratorImport, export_generator, import_generator
from motionrft.training.released import read_content, write_released
from tests.latent_fixtures import KIND, SMALL, SMALL_LCM, batch_of, build_of, small_lcm, small_mld

EVALUATORS = {f"t2m_{name}.weight": torch.zeros(2) for name in ("textencoder", "moveencoder", "motionencoder")}
PUBLISHED = {"heads": 4, "text_gain": 1.0}


def tensors_of(generator: LatentGenerator) -> dict[str, Tensor]:
    found = FORMATS[generator.spec.family].write(generator)
    return next(content for name, content in found.items() if name.endswith(".ckpt"))["state_dict"]


def lightning(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": {**tensors, **EVALUATORS}, "epoch": 3, "optimizer_states": [{"lr": 0.1}], "loops": {}}


@pytest.mark.parametrize("nested", [True, False])
def test_one_file_holds_denoiser_and_autoencoder(nested: bool) -> None:
    generator = small_mld(**PUBLISHED)
    tensors = tensors_of(generator)
    content = lightning(tensors) if nested else {**tensors, **EVALUATORS}
    found = MLDFormat().read({"weights": content}, {})
    assert found.variant == "mld v2" and found.text_encoder.endswith("sentence-t5-large")
    assert found.model == replace(generator.config, dropout=0.1, smooth_positions=False, scale_latents=False)
    assert set(found.network) == set(generator.network.state_dict())
    frozen = {n: t for n, t in generator.frozen.state_dict().items() if n != "null"}
    assert {n: t.shape for n, t in found.frozen.items()} == {n: t.shape for n, t in frozen.items()}
    assert set(EVALUATORS) <= set(found.dropped) and ("optimizer_states" in found.dropped) == nested
    assert (found.pooled_dim, found.token_dim, found.fps, found.max_frames) == (12, 0, 20.0, 196)


def test_the_autoencoder_may_lie_in_its_own_file() -> None:
    tensors = tensors_of(small_mld(**PUBLISHED))
    parts = [{n: t for n, t in tensors.items() if n.startswith(p)} for p in ("denoiser.", "vae.")]
    whole = MLDFormat().read({"weights": tensors}, {})
    other = {n: t + 1 for n, t in parts[1].items()}
    split = MLDFormat().read({"weights": parts[0], "vae": {"state_dict": {**parts[1], **EVALUATORS}}}, {})
    assert all(torch.equal(t, split.frozen[n]) for n, t in whole.frozen.items())
    kept = MLDFormat().read({"weights": tensors, "vae": other}, {})  # the one it was trained with
    assert all(torch.equal(t, kept.frozen[n]) for n, t in whole.frozen.items())
    with pytest.raises(CheckpointError, match=r"autoencoder.*only a denoiser.*vae_humanml\.ckpt"):
        MLDFormat().read({"weights": parts[0]}, {})
    with pytest.raises(CheckpointError, match=r"denoiser\."):
        MLDFormat().read({"weights": parts[1]}, {})


def test_the_two_text_encoders_of_one_shape_are_told_apart() -> None:
    plain = tensors_of(small_mld(latent_dim=16, text_relu=True, **PUBLISHED))
    unused = {"denoiser.mem_pos.pe": torch.zeros(500, 1, 16)}
    original = MLDFormat().read({"weights": {**plain, **unused}}, {})
    assert original.variant == "mld original" and original.text_encoder.startswith("clip:")
    assert "mem_pos.pe" not in original.network and "denoiser.mem_pos.pe" in original.dropped
    first = MLDFormat().read({"weights": plain}, {})
    assert first.variant == "mld v1" and not first.text_encoder.startswith("clip:")
    assert replace(first.model, spare_positions=True) == original.model
    assert first.model.text_relu and first.model.width == first.model.latent_dim == 16
    asked = MLDFormat().read({"weights": plain}, {"variant": "original"})
    assert asked.text_encoder == original.text_encoder
    with pytest.raises(ConfigError, match=r"'original'.*'v1'"):
        MLDFormat().read({"weights": {**plain, **unused}}, {"variant": "v1"})
    with pytest.raises(ConfigError, match="variant"):
        MLDFormat().read({"weights": plain}, {"variant": "v3"})


def test_consistency_models_and_their_versions_are_told_by_their_tensors() -> None:
    second = tensors_of(small_lcm(**PUBLISHED))
    found = MotionLCMFormat().read({"weights": second}, {})
    assert found.variant == "motionlcm v2" and found.model.guidance_dim == 16
    assert (found.model.sampling, found.model.grid_points, found.model.huber) == ("tuned", 10, 0.5)
    first = tensors_of(small_lcm(latent_dim=16, text_relu=True, **PUBLISHED))
    found = MotionLCMFormat().read({"weights": first}, {})
    assert (found.model.sampling, found.model.grid_points, found.model.huber) == ("grid", 50, 0.001)
    with pytest.raises(CheckpointError, match="family motionlcm"):
        MLDFormat().read({"weights": second}, {})
    with pytest.raises(CheckpointError, match="family mld"):
        MotionLCMFormat().read({"weights": tensors_of(small_mld(**PUBLISHED))}, {})


def test_other_files_are_refused_by_name() -> None:
    tensors = tensors_of(small_mld(**PUBLISHED))
    with pytest.raises(CheckpointError, match=r"unknown names \['generator\.weight'\]"):
        MLDFormat().read({"weights": {**tensors, "generator.weight": torch.zeros(1)}}, {})
    with pytest.raises(CheckpointError, match=r"text_encoder_proj"):  # a prefix is matched whole
        MLDFormat().read({"weights": {**tensors, "text_encoder_proj.weight": torch.zeros(1)}}, {})
    broken = {n: t for n, t in tensors.items() if n != "denoiser.emb_proj.1.weight"}
    with pytest.raises(CheckpointError, match=r"tensor emb_proj\.1\.weight"):
        MLDFormat().read({"weights": broken}, {})
    with pytest.raises(CheckpointError, match="named tensors"):
        MLDFormat().read({"weights": {"state_dict": {"a": 3}}}, {})
    with pytest.raises(CheckpointError, match="checkpoint file"):
        MLDFormat().read({}, {})


def choices() -> GeneratorImport:
    statistics = Normalizer(torch.randn(263), torch.rand(263) + 0.5, KIND)
    return GeneratorImport("stub", load_text_encoder("stub"), {KIND: statistics})


@pytest.mark.parametrize("family", ["mld", "motionlcm"])
@torch.no_grad()
def test_a_model_of_our_own_survives_export_and_import(tmp_path: Path, family: str) -> None:
    config = replace(SMALL if family == "mld" else SMALL_LCM, heads=2, text_gain=3.0)
    torch.manual_seed(0)
    generator = FAMILIES[family][1](build_of(family, 32), config)
    generator.latents.scale.fill_(0.6)
    if family == "motionlcm":
        torch.nn.init.normal_(generator.network.time_embedding.cond_proj.weight)
    form = FORMATS[family]
    write_released(tmp_path / "released", form.write(generator))
    found = import_generator(form, tmp_path / "released", tmp_path / "model", choices())
    again = found.generator
    batch = batch_of()
    text = load_text_encoder("stub").encode(["a", "b c", "d", "e"])
    if family == "mld":
        generator.latents.null.copy_(load_text_encoder("stub").encode([""]).pooled_BD[0])
    x, t = torch.randn(4, 2, 8), torch.tensor(500)
    outs = [one.predict(one.network.eval(), x, t, text, batch.lengths_B) for one in (generator, again)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    motions = [one.latents.decode(x, batch.lengths_B) for one in (generator, again)]
    torch.testing.assert_close(*motions, rtol=1e-5, atol=1e-5)
    assert [len(one.solver(4)) for one in (generator, again)] == [4, 4]
    assert torch.equal(generator.solver(4).model_time, again.solver(4).model_time)

    paths = export_generator(form, tmp_path / "model", tmp_path / "back")
    assert {p.name for p in paths} == {p.name for p in (tmp_path / "released").iterdir()}
    for path in paths:
        if path.suffix == ".ckpt":
            new, old = (read_content(p)["state_dict"] for p in (path, tmp_path / "released" / path.name))
            assert set(new) == set(old) and all(torch.equal(t, old[n]) for n, t in new.items())


@pytest.mark.parametrize("family", ["mld", "motionlcm"])
def test_an_autoencoder_of_groups_has_no_file(family: str) -> None:
    config = replace(SMALL if family == "mld" else SMALL_LCM, frames_per_token=2)
    with pytest.raises(ConfigError, match=r"single frames.*frames_per_token=2"):
        FORMATS[family].write(FAMILIES[family][1](build_of(family, 32), config))
