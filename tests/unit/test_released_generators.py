"""`motionrft import FAMILY` and `export` for every family: files in, the same model, the same files out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motionrft.cli.main import main
from motionrft.core.errors import CheckpointError
from motionrft.core.types import Representation
from motionrft.generators.acmdm import ACMDMConfig, ACMDMLatentConfig
from motionrft.generators.base import Generator, ModelConfig
from motionrft.generators.hymotion import FULL
from motionrft.generators.mdm import OFFICIAL
from motionrft.generators.mld import MLDConfig
from motionrft.generators.motiondiffuse import MotionDiffuseConfig
from motionrft.generators.motionlcm import MotionLCMConfig
from motionrft.generators.registry import FAMILIES, FORMATS, GeneratorConfig, TextSide, build_generator
from motionrft.generators.sampling import generate
from motionrft.nn.text import load_text_encoder
from motionrft.representations.normalize import Normalizer
from motionrft.training.checkpoint import load_checkpoint
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.recipes.released_generator import locate
from motionrft.training.released import Unread, read_content, write_released
from tests.hymotion_fixtures import statistics as rotation_statistics
from tests.released_fixtures import write_statistics
from tests.text_fixtures import write_sentence_t5
from tests.text_model_fixtures import write_clip, write_distilbert, write_qwen3


@dataclass(frozen=True)
class Case:
    family: str
    model: ModelConfig
    encoder: str  # key of the `encoders` fixture
    steps: int = 3
    options: tuple[str, ...] = ()


_MLD = dict(width=16, heads=2, ff=24, layers=3, text_gain=1.0)
CASES = {
    "mld": Case("mld", MLDConfig(latent_tokens=1, latent_dim=16, **_MLD), "sentence", options=("--variant", "v1")),
    "mld++": Case("mld", MLDConfig(latent_tokens=4, latent_dim=8, text_relu=False, **_MLD), "sentence"),
    "motionlcm": Case(
        "motionlcm",
        MotionLCMConfig(latent_tokens=4, latent_dim=8, text_relu=False, guidance_dim=16, sampling="tuned", **_MLD),
        "sentence",
        2,
    ),
    "mdm": Case("mdm", replace(OFFICIAL, latent_dim=16, layers=2, ff=1024), "clip-mdm"),
    "motiondiffuse": Case("motiondiffuse", MotionDiffuseConfig(target="noise"), "clip-tokens"),
    "acmdm": Case("acmdm", ACMDMConfig(layers=2, heads=1, text_gain=1.0), "clip"),
    "acmdm latent": Case("acmdm", ACMDMLatentConfig(layers=2, heads=1, patch=11, text_gain=1.0), "clip"),
    "hymotion": Case(
        "hymotion",
        replace(FULL, width=32, heads=2, double_blocks=1, single_blocks=2, refiner_blocks=1, train_frames=294),
        "hymotion",
    ),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return kind -> encoder name, tiny and random in the published layouts."""
    root = tmp_path_factory.mktemp("encoders")
    clip = write_clip(root / "clip", width=512, joint=512)  # published exports know CLIP's sizes only
    qwen, prompt = write_qwen3(root / "qwen"), root / "prompt.txt"
    prompt.write_text("Describe the motion.", encoding="utf-8")
    return {
        "sentence": str(write_sentence_t5(root / "sentence-t5") or root / "sentence-t5"),
        **{kind: f"{kind}:{clip}" for kind in ("clip", "clip-mdm", "clip-tokens")},
        "distilbert": f"distilbert:{write_distilbert(root / 'bert')}",
        "hymotion": f"hymotion:{qwen},{clip},{prompt},any-prompt,float32",
    }


def normalizer(kind: Representation) -> Normalizer:
    if kind is Representation.ROTATION:
        return rotation_statistics()  # random ones are not taken for rotations
    draw = torch.Generator().manual_seed(3)
    if kind is Representation.JOINT:
        mean, std = torch.randn(3, generator=draw), 0.5 + torch.rand(3, generator=draw)
        return Normalizer.from_pooled(mean, std, kind)
    return Normalizer(torch.randn(kind.dim, generator=draw), 0.5 + torch.rand(kind.dim, generator=draw), kind)


def original(case: Case, encoder: Any) -> Generator:
    """Return a generator with random weights everywhere: nothing is zero, nothing is a default."""
    config = GeneratorConfig(case.model, max_frames=196, train_steps=1000)
    kind = case.model.representations[0]
    null = encoder.encode([""]) if case.model.needs_null else None
    torch.manual_seed(0)
    made = build_generator(
        config, normalizer(kind), TextSide(encoder.fingerprint, encoder.dim, encoder.pooled_dim, null), 20.0
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (made.network, made.frozen):
            for name, parameter in module.named_parameters():
                noise = 0.1 * torch.randn(parameter.shape, generator=draw)
                parameter.copy_(noise + (1.0 if "norm" in name and parameter.ndim == 1 else 0.0))
    made.network.eval()
    return made


def written(case: Case, made: Generator, folder: Path) -> Path:
    """Write the released files, with statistics beside them."""
    write_released(folder, FORMATS[case.family].write(made))
    if case.family in ("mld", "motionlcm", "mdm"):
        write_statistics(folder / "stats")
        np.save(folder / "stats" / "Mean.npy", made.normalizer.mean.numpy())
        np.save(folder / "stats" / "Std.npy", made.normalizer.std.numpy())
    return folder


def bring(case: Case, folder: Path, out: Path, encoder: str, *more: str) -> int:
    stats = ["--stats", str(folder / "stats")] if case.family in ("mld", "motionlcm", "mdm") else []
    command = ["import", case.family, str(folder), "--out", str(out), *stats, *case.options, *more]
    return main([*command, *(["--text-encoder", encoder] if encoder else [])])


def motions(made: Generator, encoder: Any, steps: int) -> Tensor:
    lengths = torch.tensor([40, 24])
    text = encoder.encode(["a person walks", "someone sits down slowly"])
    return generate(made, None, text, lengths, torch.tensor([5, 9]), steps, 0)


@pytest.mark.parametrize("name", CASES)
def test_files_become_the_same_model_and_the_same_files(
    name: str, encoders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    case = CASES[name]
    encoder = load_text_encoder(encoders[case.encoder])
    made = original(case, encoder)
    folder = written(case, made, tmp_path / "published")
    assert bring(case, folder, tmp_path / "model", encoders[case.encoder]) == 0
    told = capsys.readouterr().out
    assert "inputs.generator=" in told and "licence" in told and "warning" not in told
    loaded = load_generator(tmp_path / "model")
    assert type(loaded) is type(made) and loaded.spec.text_encoder == encoder.fingerprint
    card = load_checkpoint(tmp_path / "model").card.config["generator"]
    assert card["variant"] and card["licence"] and card["family"] == case.family
    made.guidance = loaded.guidance
    made.solver_name = loaded.solver_name
    made.spec = replace(made.spec, train_steps=loaded.spec.train_steps)
    torch.testing.assert_close(
        motions(loaded, encoder, case.steps), motions(made, encoder, case.steps), rtol=1e-5, atol=1e-5
    )

    assert main(["export", case.family, str(tmp_path / "model"), "--out", str(tmp_path / "back")]) == 0
    for path in sorted((tmp_path / "back").rglob("*.*")):
        if path.is_file():
            same(read_content(path), read_content(folder / path.relative_to(tmp_path / "back")))


def same(got: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert set(got) == set(want)
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    else:
        assert got == want


def damaged(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model000000000.pt"
    content = dict(torch.load(path, weights_only=True))  # noqa: TID251  files of this test
    change(content)
    torch.save(content, path)


@pytest.fixture
def published(encoders: dict[str, str], tmp_path: Path) -> Path:
    """Return the files of a tiny MDM."""
    case = CASES["mdm"]
    return written(case, original(case, load_text_encoder(encoders["clip-mdm"])), tmp_path / "published")


def test_everything_that_does_not_fit_is_reported_together(
    published: Path, encoders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["extra.weight"] = torch.ones(2)
        del content["seqTransEncoder.layers.1.norm1.bias"]
        content["seqTransEncoder.layers.0.norm2.weight"] = torch.ones(5)

    damaged(published, change)
    assert bring(CASES["mdm"], published, tmp_path / "model", encoders["clip-mdm"]) == 2
    said = capsys.readouterr().err
    for name in ("extra.weight", "layers.1.norm1.bias", "layers.0.norm2.weight"):
        assert name in said
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(
    bad: float, published: Path, encoders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged(published, lambda content: content["embed_text.weight"].view(-1)[3:4].fill_(bad))
    assert bring(CASES["mdm"], published, tmp_path / "model", encoders["clip-mdm"]) == 2
    assert "embed_text.weight" in capsys.readouterr().err


def test_text_encoders_are_named_and_never_guessed(
    published: Path, encoders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Another reading of the same folder has the same sizes and would load."""
    assert bring(CASES["mdm"], published, tmp_path / "a", encoders["clip"]) == 2
    assert "clip-mdm" in capsys.readouterr().err
    assert bring(CASES["mdm"], published, tmp_path / "b", "") == 0
    assert "recorded by name only" in capsys.readouterr().out
    case = CASES["mld"]
    folder = written(case, original(case, load_text_encoder(encoders["sentence"])), tmp_path / "mld")
    assert bring(case, folder, tmp_path / "c", "") == 2  # the empty caption is encoded when importing
    assert "empty caption" in capsys.readouterr().err


def test_statistics_are_given_and_never_assumed(
    published: Path, encoders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["import", "mdm", str(published), "--out", str(tmp_path / "m"), "--text-encoder", encoders["clip-mdm"]]
    assert main(command) == 2
    assert "--stats" in capsys.readouterr().err


def test_a_folder_in_use_and_files_that_are_there_are_left_alone(
    published: Path, encoders: dict[str, str], tmp_path: Path
) -> None:
    assert bring(CASES["mdm"], published, tmp_path / "model", encoders["clip-mdm"]) == 0
    assert bring(CASES["mdm"], published, tmp_path / "model", encoders["clip-mdm"]) == 2
    assert main(["export", "mdm", str(tmp_path / "model"), "--out", str(published)]) == 2
    assert main(["export", "acmdm", str(tmp_path / "model"), "--out", str(tmp_path / "x")]) == 2


def test_several_files_that_fit_are_a_question(published: Path) -> None:
    (published / "model000000001.pt").write_bytes((published / "model000000000.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"model000000000\.pt, model000000001\.pt"):
        locate(FORMATS["mdm"], published)
    found = locate(FORMATS["mdm"], published / "model000000001.pt")
    assert found["args"] == published / "args.json"


def test_objects_in_a_file_are_dropped_and_not_run(tmp_path: Path, encoders: dict[str, str]) -> None:
    """Training frameworks pickle callbacks and namespaces; a file may also try to run code."""
    case = CASES["mld"]
    made = original(case, load_text_encoder(encoders["sentence"]))
    folder = written(case, made, tmp_path / "published")
    path = next(folder.glob("*.ckpt"))
    content = read_content(path)
    content |= {"hyper_parameters": argparse.Namespace(lr=1), "callbacks": {"own": _Touch(tmp_path / "ran")}}
    torch.save(content, path)
    read = read_content(path)
    assert isinstance(read["hyper_parameters"], Unread) and isinstance(read["callbacks"]["own"], Unread)
    assert bring(case, folder, tmp_path / "model", encoders["sentence"]) == 0
    assert not (tmp_path / "ran").exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_every_family_has_its_format_and_its_case() -> None:
    assert set(FAMILIES) == set(FORMATS) == {case.family for case in CASES.values()}
    assert all(form.licence and form.text for form in FORMATS.values())
