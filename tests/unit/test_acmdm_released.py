"""Released ACMDM files: both ways, what is preferred and left out, and what stops on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.types import Condition
from motionrft.generators.acmdm import ACMDMGenerator
from motionrft.generators.acmdm_released import ACMDMReleased
from motionrft.generators.base import Build
from motionrft.generators.registry import FORMATS
from motionrft.generators.sampling import generate
from motionrft.nn.text import StubEncoder
from motionrft.representations.normalize import Normalizer
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.recipes.released_generator import GeneratorImport, export_generator, import_generator
from motionrft.training.released import read_content, write_released
from tests.acmdm_fixtures import JOINT, LATENT, MODELS, SPEC, make, make_batch, statistics

FORM = ACMDMReleased()
LONG = replace(SPEC, max_frames=196)
EACH = pytest.mark.parametrize("name", MODELS)


def published(name: str, spec=LONG, normalizer: Normalizer | None = None, **changes: Any) -> ACMDMGenerator:
    """Return a generator of the published length with random weights everywhere."""
    config = replace(MODELS[name], **changes)
    generator = ACMDMGenerator(Build(spec, normalizer or statistics(), 0, 12), config)
    small = make(config)
    generator.network.load_state_dict(small.network.state_dict())
    generator.frozen.load_state_dict(small.frozen.state_dict())
    return generator


def motion(generator: ACMDMGenerator) -> Tensor:
    batch = make_batch()
    return generate(generator, None, batch.text, batch.lengths_B, batch.keys_B, 3, seed=1)


def write(folder: Path, generator: ACMDMGenerator) -> dict[str, Any]:
    files = FORM.write(generator)
    write_released(folder, files)
    return files


def bring(path: Path, out: Path, **choices: Any) -> ACMDMGenerator:
    import_generator(FORM, path, out, GeneratorImport(**choices))
    found = load_generator(out)
    assert isinstance(found, ACMDMGenerator)
    return found


@EACH
def test_files_are_written_as_published_and_read_back_to_the_same_motion(name: str, tmp_path: Path) -> None:
    generator = published(name)
    files = write(tmp_path / "files", generator)
    zoo = {"raw": "ACMDM-Raw-Flow-2x1-PatchSize11", "latent": "ACMDM-Flow-2x1-PatchSize11"}[name]
    wanted = {f"{zoo}/model/latest.tar", "22x3_mean.npy", "22x3_std.npy"}
    if name == "latent":
        parts = ("model/latest.tar", "AE_2D_Causal_Post_Mean.npy", "AE_2D_Causal_Post_Std.npy")
        wanted |= {f"AE_2D_Causal/{part}" for part in parts}
    assert set(files) == wanted
    assert set(files[f"{zoo}/model/latest.tar"]) == {"acmdm", "ema_acmdm", "ep", "total_it"}
    assert np.load(tmp_path / "files" / "22x3_mean.npy").shape == (3,)
    found = bring(tmp_path / "files", tmp_path / "model")
    assert found.spec.max_frames == 196 and found.network.base == generator.network.base
    assert found.spec.guidance_scale == 3.0 and found.solver_name == "euler"
    assert found.normalizer.fingerprint == generator.normalizer.fingerprint
    assert torch.equal(motion(found), motion(generator))
    export_generator(FORM, tmp_path / "model", tmp_path / "again")
    for path in wanted:
        first, second = (read_content(tmp_path / folder / path) for folder in ("files", "again"))
        torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_the_average_is_preferred_and_text_encoders_are_left_out(tmp_path: Path) -> None:
    generator = published("raw")
    content = FORM.write(generator)["ACMDM-Raw-Flow-2x1-PatchSize11/model/latest.tar"]
    content["acmdm"] = {k: torch.zeros_like(t) for k, t in content["acmdm"].items()}
    content["ema_acmdm"] = dict(content["ema_acmdm"]) | {"clip_model.positional_embedding": torch.ones(2)}
    content |= {"opt_acmdm": {"state": {}}, "scheduler": {}}
    found = FORM.read({"weights": content}, {})
    assert set(found.network) == set(generator.network.state_dict())
    assert torch.equal(found.network["y_embedder.bias"], generator.network.y_embedder.bias)
    left = {"ema_acmdm.clip_model.positional_embedding", "acmdm", "opt_acmdm", "scheduler", "ep", "total_it"}
    assert set(found.dropped) == left
    del content["ema_acmdm"]
    assert float(FORM.read({"weights": content}, {}).network["y_embedder.bias"].abs().max()) == 0.0
    assert found.text_encoder == "clip:openai/clip-vit-base-patch32" and (found.token_dim, found.pooled_dim) == (0, 12)


def test_a_weight_file_alone_finds_the_autoencoder_beside_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "files", published("latent"))
    write(tmp_path / "files" / "other", published("raw"))
    with pytest.raises(CheckpointError, match="one file for weights"):
        bring(tmp_path / "files", tmp_path / "both")
    found = bring(tmp_path / "files" / "ACMDM-Flow-2x1-PatchSize11" / "model" / "latest.tar", tmp_path / "model")
    assert found.is_latent


def test_statistics_come_from_the_files_or_are_asked_for(tmp_path: Path) -> None:
    generator = published("raw")
    write(tmp_path / "files", generator)
    (tmp_path / "files" / "22x3_mean.npy").unlink()
    with pytest.raises(ConfigError, match="joint statistics"):
        bring(tmp_path / "files", tmp_path / "model")
    found = bring(tmp_path / "files", tmp_path / "model", normalizers={JOINT: statistics()})
    assert found.normalizer.fingerprint == generator.normalizer.fingerprint


def test_models_of_ours_keep_gain_length_and_statistics_per_joint(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    each = Normalizer(torch.randn(66, generator=draw), torch.rand(66, generator=draw) + 0.5, JOINT)
    generator = published("latent", SPEC, each, text_gain=3.0, ae_dropout=0.2)
    write(tmp_path / "files", generator)
    assert np.load(tmp_path / "files" / "22x3_std.npy").shape == (22, 3)
    found = bring(tmp_path / "files", tmp_path / "model")
    assert found.spec.max_frames == 24 and found.config == replace(generator.config, text_gain=1.0)
    assert found.normalizer.fingerprint == each.fingerprint
    torch.testing.assert_close(motion(found), motion(generator), rtol=1e-3, atol=1e-4)


def test_a_variational_twin_is_recognised(tmp_path: Path) -> None:
    generator = published("latent", variational=True)
    files = write(tmp_path / "files", generator)
    assert "VAE_2D_Causal/VAE_2D_Causal_Post_Std.npy" in files
    found = bring(tmp_path / "files", tmp_path / "model")
    assert found.config.variational and torch.equal(motion(found), motion(generator))


def test_text_features_of_another_size_or_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "files", published("raw"))

    class Clip(StubEncoder):
        pass

    with pytest.raises(ConfigError, match="text encoder like 'clip:"):
        bring(tmp_path / "files", tmp_path / "a", encoder=StubEncoder(12), text_encoder="minilm")
    with pytest.raises(ConfigError, match="12 features of the sentence vector"):
        bring(tmp_path / "files", tmp_path / "b", encoder=Clip(32), text_encoder="clip:there")
    found = bring(tmp_path / "files", tmp_path / "c", encoder=Clip(12), text_encoder="clip:there")
    assert found.spec.text_encoder == Clip(12).fingerprint


def damaged(name: str, damage: str) -> dict[str, Any]:
    """Return what was read from files, with something wrong."""
    content = FORM.write(published(name))
    weights = next(v for k, v in content.items() if k.startswith("ACMDM"))
    weights["ema_acmdm"] = dict(weights["ema_acmdm"])
    files = {"weights": weights}
    if name == "latent":
        files |= {
            "autoencoder": content["AE_2D_Causal/model/latest.tar"],
            "latent_mean": content["AE_2D_Causal/AE_2D_Causal_Post_Mean.npy"],
            "latent_std": content["AE_2D_Causal/AE_2D_Causal_Post_Std.npy"],
        }
    if damage in files:
        del files[damage]
    elif damage == "mesh":
        weights["ema_acmdm"]["x_embedder.weight"] = torch.zeros(64, 12, 1, 28)
    elif damage == "width":
        weights["ema_acmdm"]["x_embedder.weight"] = torch.zeros(96, 3, 1, 22)
    elif damage == "other":
        files["weights"] = {"state_dict": weights["ema_acmdm"]}
    elif damage == "swapped":
        files["autoencoder"] = weights
    else:
        del weights["ema_acmdm"][damage]
    return files


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("latent", "autoencoder", r"auto-encoder's latest\.tar; got no such file.*checkpoints/t2m"),
        ("latent", "latent_std", r"Post_Std\.npy"),
        ("latent", "mesh", "patch 28.*meshes"),
        ("raw", "width", "divisible by 64"),
        ("raw", "other", r"tensors under 'acmdm'.*state_dict"),
        ("latent", "swapped", "tensors under 'ae'"),
        ("raw", "y_embedder.weight", r"y_embedder\.weight"),
    ],
)
def test_files_that_do_not_fit_say_so(name: str, damage: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        FORM.read(damaged(name, damage), {})


def test_a_missing_tensor_is_named_before_anything_is_written(tmp_path: Path) -> None:
    files = FORM.write(published("raw"))
    weights = next(v for k, v in files.items() if k.startswith("ACMDM"))
    del weights["ema_acmdm"]["ACMDMTransformer.1.attn.k_norm.weight"]
    write_released(tmp_path / "files", files)
    with pytest.raises(CheckpointError, match=r"ACMDMTransformer\.1\.attn\.k_norm\.weight"):
        bring(tmp_path / "files", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_format_is_registered_and_conditions_without_tokens_work() -> None:
    assert isinstance(FORMS := FORMATS["acmdm"], ACMDMReleased) and FORMS.licence.startswith("MIT")
    generator, batch = published("raw"), make_batch()
    bare = Condition(torch.zeros(5, 1, 0), torch.ones(5, 1, dtype=torch.bool), batch.text.pooled_BD)
    got = generate(generator, None, bare, batch.lengths_B, batch.keys_B, 3, seed=1)
    assert torch.equal(got, motion(generator)) and LATENT.family == generator.spec.family
