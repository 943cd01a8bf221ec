"""Released MDM files: what is read from args.json, what must agree with it, and the way back."""

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
from motionrft.generators.mdm import MDMGenerator
from motionrft.generators.mdm_network import (
    OFFICIAL,
    OFFICIAL_DECODER,
    OFFICIAL_DECODER_TOKENS,
    MDMConfig,
    interleaved_sinusoid,
)
from motionrft.generators.mdm_released import FIXED, MDMReleased
from motionrft.generators.registry import FORMATS
from motionrft.representations.normalize import Normalizer
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.recipes.released_generator import GeneratorImport, export_generator, import_generator
from motionrft.training.released import read_content, write_released

KIND = Representation.KINEMATIC
FORMAT = MDMReleased(position_rows=7)
SIZES: dict[str, Any] = {"latent_dim": 16, "layers": 2, "ff": 24}
VARIANTS = {
    "clip encoder": OFFICIAL,
    "clip encoder with frame mask": replace(OFFICIAL, mask_frames=True, text_dropout=0.2),
    "clip decoder": OFFICIAL_DECODER,
    "clip decoder with time token": replace(OFFICIAL_DECODER, time_token=True),
    "bert decoder": OFFICIAL_DECODER_TOKENS,
}


def make(config: MDMConfig, features: int = 263, steps: int = 50, frames: int = 196) -> MDMGenerator:
    torch.manual_seed(0)
    statistics = Normalizer(torch.zeros(features), torch.ones(features), KIND)
    spec = GeneratorSpec("mdm", KIND, 20.0, frames, "text", "x0", steps, 2.5)
    return MDMGenerator(Build(spec, statistics, config.text_dim, config.text_dim, "ddpm"), config)


def files_of(generator: MDMGenerator) -> dict[str, Any]:
    files = FORMAT.write(generator)
    return {"weights": files["model000000000.pt"], "args": files["args.json"]}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_what_is_written_reads_back_as_the_same_model(config: MDMConfig) -> None:
    config = replace(config, **SIZES)
    first = make(config)
    found = FORMAT.read(files_of(first), {})
    assert found.model == config and found.train_steps == 50 and found.dropped == FIXED
    second = make(found.model)
    second.network.load_state_dict(dict(found.network), strict=True)
    for name, value in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value)


def test_the_position_tables_have_the_asked_length_and_the_published_values() -> None:
    weights = files_of(make(replace(OFFICIAL, **SIZES)))["weights"]
    for name in FIXED:
        assert torch.equal(weights[name], interleaved_sinusoid(torch.arange(7), 16)[:, None])


def test_fields_missing_from_args_have_their_published_meaning() -> None:
    generator = make(replace(OFFICIAL, **SIZES))
    found = FORMAT.read({**files_of(generator), "args": {}}, {})
    assert found.model == generator.config and not found.model.mask_frames
    assert (found.train_steps, found.guidance, found.variant) == (1000, 2.5, "humanml encoder clip 1000 steps")
    masked = FORMAT.read({**files_of(generator), "args": {"mask_frames": True, "cond_mask_prob": 0.0}}, {})
    assert masked.model.mask_frames and masked.guidance == 1.0  # nothing to guide away from was learned


def test_the_average_is_taken_where_it_was_trained_with_one() -> None:
    files = files_of(make(replace(OFFICIAL, **SIZES)))
    online, args = files["weights"], files["args"]
    average = {name: t + 1 for name, t in online.items()} | {"clip_model.weight": torch.zeros(2)}
    online = {name: torch.nn.Parameter(t) for name, t in online.items()}  # as torch files keep them

    def read(weights: dict[str, Any], use_ema: bool) -> Any:
        return FORMAT.read({"weights": weights, "args": {**args, "use_ema": use_ema}}, {})

    nested, name = {"model": online, "model_avg": average}, "embed_text.bias"
    taken = read(nested, True)
    assert torch.equal(taken.network[name], average[name]) and set(taken.dropped) == {
        "model",
        "clip_model.weight",
        *FIXED,
    }
    taken = read(nested, False)
    assert torch.equal(taken.network[name], online[name]) and not taken.network[name].requires_grad
    assert torch.equal(read(average, True).network[name], average[name])  # an average taken out of its file
    with pytest.raises(CheckpointError, match=r"model_avg.*use_ema=True.*\['model'\]"):
        read({"model": online}, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "trans_dec"}, r"seqTransDecoder.*arch='trans_dec'.*seqTransEncoder"),
        ({"latent_dim": 512}, r"latent_dim=512 but poseEmbedding.* 16"),
        ({"layers": 8}, r"layers=8 but .* 2"),
        ({"ff_size": 1024}, r"ff_size=1024 but linear1.* 24"),
        ({"text_encoder_type": "bert"}, r"'bert' \(768 features\) but embed_text.weight reads 512"),
        ({"dataset": "kit"}, r"dataset='kit' but poseEmbedding reads 263"),
        ({"layers": 8, "latent_dim": 512}, r"latent_dim=512.*layers=8"),
    ],
)
def test_a_contradiction_names_both_sides(changes: dict[str, Any], message: str) -> None:
    files = files_of(make(replace(OFFICIAL, **SIZES)))
    with pytest.raises(CheckpointError, match=message):
        FORMAT.read({**files, "args": {**files["args"], **changes}}, {})


@pytest.mark.parametrize(
    "changes", [{"arch": "gru"}, {"noise_schedule": "linear"}, {"emb_policy": "concat"}, {"pred_len": 40}]
)
def test_other_models_under_the_same_names_are_refused(changes: dict[str, Any]) -> None:
    files = files_of(make(replace(OFFICIAL, **SIZES)))
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        FORMAT.read({**files, "args": {**files["args"], **changes}}, {})


def test_missing_files_and_foreign_tensors_are_refused() -> None:
    files = files_of(make(replace(OFFICIAL, **SIZES)))
    with pytest.raises(CheckpointError, match=r"no args\.json"):
        FORMAT.read({"weights": files["weights"]}, {})
    with pytest.raises(CheckpointError, match=r"no model\*\.pt"):
        FORMAT.read({"args": {}}, {})
    with pytest.raises(CheckpointError, match="another family"):
        FORMAT.read({"weights": {"out.weight": torch.zeros(1)}, "args": {}}, {})
    weights = dict(files["weights"])
    del weights["embed_text.weight"]
    with pytest.raises(CheckpointError, match=r"embed_text\.weight"):
        FORMAT.read({**files, "weights": weights}, {})


def test_a_kit_model_runs_at_its_own_frame_rate() -> None:
    files = files_of(make(replace(OFFICIAL, **SIZES), features=251))
    found = FORMAT.read(files, {})
    assert files["args"]["dataset"] == "kit" and found.fps == 12.5 and found.variant.startswith("kit")


def test_models_that_the_published_code_cannot_build_are_not_exported() -> None:
    with pytest.raises(ConfigError, match=r"text features.*norm_first; condition_bias; frames_per_token=2"):
        FORMAT.write(make(MDMConfig(**SIZES)))
    with pytest.raises(ConfigError, match="text_gain"):
        FORMAT.write(make(replace(OFFICIAL, **SIZES, text_gain=2.0)))
    with pytest.raises(ConfigError, match="60 frames"):
        FORMAT.write(make(replace(OFFICIAL, **SIZES), frames=60))
    FORMAT.write(make(replace(OFFICIAL, **SIZES, mask_frames=True), frames=60))


def test_files_are_imported_sampled_as_published_and_exported_again(tmp_path: Path) -> None:
    first = make(replace(OFFICIAL_DECODER_TOKENS, **SIZES))
    write_released(tmp_path / "published", FORMAT.write(first))
    choices = GeneratorImport(normalizers={KIND: first.normalizer})
    import_generator(FORMATS["mdm"], tmp_path / "published", tmp_path / "model", choices)
    model = load_generator(tmp_path / "model")
    assert model.config == first.config and len(model.solver(50)) == 50 and model.solver_name == "ddpm"
    assert (model.spec.sampling_steps, model.spec.train_steps, model.guidance) == (50, 50, 2.5)
    assert model.spec.text_encoder == "distilbert:distilbert-base-uncased"
    export_generator(FORMAT, tmp_path / "model", tmp_path / "again")
    for name in ("model000000000.pt", "args.json"):
        before, after = (read_content(tmp_path / folder / name) for folder in ("published", "again"))
        assert list(before) == list(after)
        assert all(
            torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items()
        )
