"""Every recipe that feeds a generator refuses a dataset without the text features it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from motionrft.core.errors import DataError
from motionrft.core.plain import to_plain
from motionrft.generators.mdm_network import MDMConfig
from motionrft.generators.registry import GeneratorConfig, TextSide, build_generator, generator_card
from motionrft.training.recipes import evaluate, finetune
from motionrft.training.recipes.common import Split
from motionrft.training.recipes.evaluate import EvaluateRecipe, RewardFolders, ScoreJob
from motionrft.training.recipes.finetune import FinetuneJob
from motionrft.training.recipes.generator import GenerateJob, run_generate
from motionrft.training.recipes.generator_files import Fixed, generator_checkpoint_card, save_weights
from motionrft.training.runtime_local import LocalRuntime
from tests.prepare_fixtures import make_dataset

OTHER = "a" * 64  # another encoder whose features are of the same size: nothing else would notice


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generator_text") / "data"
    make_dataset(root, 10)
    return root


def generator_of(data: Path, encoder: str, out: Path) -> str:
    """Return a folder with an untrained generator that says it reads the features of `encoder`."""
    split = Split.open(str(data), "train", {})
    config = GeneratorConfig(MDMConfig(latent_dim=16, layers=1, heads=2, ff=16, text_dim=split.text.dim), max_frames=48)
    scale = split.normalizer(config.representation())
    text = TextSide(encoder, split.text.dim, split.text.pooled_dim)
    generator = build_generator(config, scale, text, 20.0)
    card = generator_checkpoint_card(to_plain(generator_card(config, scale, text, 20.0)), scale, {})
    save_weights(out, dict(generator.network.named_parameters()), card, Fixed.of(generator), 0, 0)
    return str(out)


def tune(data: Path, generator: str, out: Path) -> None:
    finetune.run(LocalRuntime(), to_plain(FinetuneJob(str(data), generator, RewardFolders())), out, {})


def score(data: Path, generator: str, out: Path) -> None:
    recipe = EvaluateRecipe(split="val", num_steps=1)
    evaluate.score(ScoreJob(str(data), "after", 0, generator, "", str(out / "m.npz"), {}, RewardFolders(), {}, recipe))


def make(data: Path, generator: str, out: Path) -> None:
    run_generate(LocalRuntime(), to_plain(GenerateJob(str(data), generator, ("val",), num_steps=1)), out, {})


@pytest.mark.parametrize("recipe", [tune, score, make])
@pytest.mark.parametrize(
    ("encoder", "advice"), [(OTHER, "--add-text"), ("clip:ViT-B-32", "--text-encoder")], ids=["other", "name"]
)
def test_features_of_another_encoder_are_refused(
    data: Path, tmp_path: Path, recipe: Callable[[Path, str, Path], None], encoder: str, advice: str
) -> None:
    generator = generator_of(data, encoder, tmp_path / "model")
    with pytest.raises(DataError, match=f"text features of encoder {encoder[:12]}.*{advice}"):
        recipe(data, generator, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.npz"))


@pytest.mark.parametrize("recipe", [score, make])
def test_features_of_its_own_encoder_are_read(
    data: Path, tmp_path: Path, recipe: Callable[[Path, str, Path], None]
) -> None:
    own = Split.open(str(data), "val", {}).text.fingerprint
    recipe(data, generator_of(data, own, tmp_path / "model"), tmp_path / "out")
    assert list((tmp_path / "out").glob("*.npz"))
