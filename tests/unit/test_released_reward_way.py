"""From a Sentence-T5 folder to a generator tuned on an imported reward, at tiny sizes, and what stops on the way."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from motionrft.cli.main import main
from motionrft.core.errors import CheckpointError, ConfigError, DataError, RepresentationError
from motionrft.core.plain import to_plain
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.data.normalizers import load_normalizer, load_normalizers
from motionrft.data.tables import TextTable
from motionrft.evaluation.card import make_card, save_evaluator
from motionrft.evaluation.evaluator import Evaluator, EvaluatorConfig
from motionrft.evaluation.vocabulary import Vocabulary
from motionrft.finetune.strategies import EasyTune
from motionrft.generators.mdm_network import MDMConfig
from motionrft.generators.registry import GeneratorConfig
from motionrft.nn.text import load_text_encoder
from motionrft.training.checkpoint import load_checkpoint
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes import finetune
from motionrft.training.recipes.common import Split, TrainConfig
from motionrft.training.recipes.evaluate import BASE, REAL, EvaluateRecipe, RewardFolders, RowSpec, evaluate_rows
from motionrft.training.recipes.finetune import FinetuneJob, FinetuneRecipe
from motionrft.training.recipes.generator import PretrainJob, PretrainRecipe, run_pretrain
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.recipes.released_reward import ImportChoices, import_motionreward
from motionrft.training.recipes.reward import load_reward
from motionrft.training.runtime_local import LocalExecutor, LocalRuntime
from tests.prepare_fixtures import make_dataset, tree_bytes
from tests.released_fixtures import SMALL, released_contents, write_files
from tests.text_fixtures import SENTENCE, WIDTH, write_sentence_t5

ALL = {"semantic": 1.0, "preference": 0.002, "authenticity": 0.002, "similarity": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything up to the fine-tuning, made by the commands of the README."""
    root = tmp_path_factory.mktemp("way")
    write_sentence_t5(root / "sentence-t5")
    prepare = ["prepare", "--source", "synthetic", "--out", str(root / "data"), "--backend", "single"]
    sizes = ["prepare.num_clips=24", "prepare.max_frames=30"]
    assert main([*prepare, *sizes, f"prepare.text_encoder={root / 'sentence-t5'}"]) == 0
    files = write_files(root / "published", released_contents(replace(SMALL, text_token_dim=WIDTH)))
    bring = ["import", "motionreward", str(files), "--out", str(root / "reward"), "--dataset", str(root / "data")]
    assert main([*bring, "--text-encoder", str(root / "sentence-t5")]) == 0
    evaluator = Evaluator(
        EvaluatorConfig(latent_dim=8, conv_dim=8, hidden_dim=8, word_dim=8),
        Vocabulary.of(TextTable.open(Dataset.open(root / "data")).captions),
        load_normalizer(Dataset.open(root / "data"), Representation.KINEMATIC),
    )
    save_evaluator(root / "evaluator", evaluator.eval(), make_card(evaluator, "A", 20.0, ["a"]))
    for kind in ("kinematic", "rotation"):
        pretrain(root, kind)
    return root


def pretrain(root: Path, kind: str, name: str = "", **settings: Any) -> Path:
    mdm = MDMConfig(latent_dim=16, layers=1, heads=2, ff=16, **settings)
    job = PretrainJob(
        str(root / "data"),
        generator=GeneratorConfig(model=mdm, max_frames=30, guidance=1.0),
        recipe=PretrainRecipe(TrainConfig(steps=1, batch_size=4), representation=kind),
    )
    run_pretrain(LocalRuntime(), to_plain(job), root / (name or kind), {})
    return root / (name or kind) / "model"


def reward_of(place: Path, name: str = "reward") -> RewardFolders:
    return RewardFolders(**{part: str(place / name / part) for part in ("backbone", "preference", "authenticity")})


def tune(place: Path, folder: Path, kind: str, weights: Mapping[str, float], reward: str = "reward") -> dict[str, Any]:
    recipe = FinetuneRecipe(
        EasyTune(window=1),
        dict(weights),
        num_steps=3,
        batches=1,
        batch_size=4,
        max_frames=30,
        optim=OptimConfig(lr=1e-3),
    )
    job = FinetuneJob(str(place / "data"), str(place / kind / "model"), reward_of(place, reward), recipe=recipe)
    return finetune.run(LocalRuntime(), to_plain(job), folder, {})


def evaluate(
    place: Path,
    folder: Path,
    kind: str,
    weights: Mapping[str, float],
    after: Path | None = None,
    reward: str = "reward",
) -> dict[str, Any]:
    rows = [RowSpec(REAL, "real"), RowSpec(BASE, "before", (str(place / kind / "model"),))]
    rows += [RowSpec("after", "after", (str(after),))] if after else []
    recipe = EvaluateRecipe(num_steps=2, batch_size=4, max_frames=30, seeds=1)
    evaluators = {"A": str(place / "evaluator")}
    found = evaluate_rows(
        LocalExecutor(), rows, str(place / "data"), evaluators, reward_of(place, reward), weights, recipe, folder
    )
    return {key: row.metrics for key, row in found.rows["A"].items()}


def rewards_in(values: Mapping[str, Any]) -> set[str]:
    """Return the terms among logged metrics (reward/NAME/raw) or columns of a row (reward_NAME)."""
    return {re.split("[/_]", name)[1] for name in values if name.startswith(("reward/", "reward_"))} - {"by"}


def import_again(place: Path, name: str, text_encoder: str) -> None:
    files, data = place / "published", Dataset.open(place / "data")
    import_motionreward(files, place / name, load_normalizers(data), text_encoder, ImportChoices())


# -------------------------------------------------------------------------------------------------------- prepare


def test_prepare_stores_the_features_of_the_folder_with_both_widths(place: Path) -> None:
    data, encoder = Dataset.open(place / "data"), load_text_encoder(str(place / "sentence-t5"))
    text = TextTable.open(data)
    assert data.manifest.text_encoder == text.fingerprint == encoder.fingerprint
    assert (data.manifest.text_dim, text.dim, text.pooled_dim) == (WIDTH, WIDTH, SENTENCE)
    captions = [max(text.captions, key=len), "", text.captions[3]]
    got, want = text.condition(captions), encoder.encode(captions)
    assert torch.equal(got.mask_BL, want.mask_BL) and got.tokens_BLD.shape == want.tokens_BLD.shape
    torch.testing.assert_close(got.tokens_BLD, want.tokens_BLD, atol=5e-3, rtol=1e-3)  # stored as float16
    torch.testing.assert_close(got.pooled_BD, want.pooled_BD, atol=1e-5, rtol=1e-5)


def test_where_the_encoder_lies_is_not_part_of_the_dataset(place: Path, tmp_path: Path) -> None:
    encoders = [place / "sentence-t5", write_sentence_t5(tmp_path / "elsewhere" / "sentence-t5")]
    for index, folder in enumerate(encoders):
        make_dataset(tmp_path / str(index), 5, text_encoder=str(folder))
    assert tree_bytes(tmp_path / "0") == tree_bytes(tmp_path / "1")
    manifest = json.loads((tmp_path / "0" / "manifest.json").read_text())
    assert manifest["options"]["text_encoder"] == manifest["text_encoder_name"] == "sentence-t5"


def test_a_generator_reads_the_width_of_the_features_it_is_conditioned_on(place: Path) -> None:
    for settings, width in (({}, SENTENCE), ({"text": "tokens", "arch": "decoder", "condition_bias": False}, WIDTH)):
        model = load_generator(pretrain(place, "kinematic", f"width{width}", **settings))
        assert model.network.embed_text.in_features == width


# -------------------------------------------------------------------------------------------------- the whole way


def test_an_imported_reward_tunes_and_scores_a_generator(place: Path, tmp_path: Path) -> None:
    result = tune(place, tmp_path / "tuned", "kinematic", ALL)
    assert result["updates"] == 1
    logged = result["last"]
    assert {"semantic", "preference", "authenticity", "similarity", "total"} <= rewards_in(logged)
    assert all(math.isfinite(v) for v in logged.values()) and logged["optim/grad_norm"] > 0
    rows = evaluate(place, tmp_path / "scores", "kinematic", ALL, after=tmp_path / "tuned" / "model")
    assert set(rows) == {REAL, BASE, "after"}
    for values in rows.values():
        assert {"semantic", "preference", "authenticity", "similarity", "total"} <= rewards_in(values)


def test_the_import_records_the_fingerprint_the_dataset_has(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = load_checkpoint(place / "reward" / "backbone").card
    assert card.fingerprints["text_encoder"] == Dataset.open(place / "data").manifest.text_encoder
    reward = load_reward(place / "reward" / "backbone", {})
    assert reward.check_text_encoder(card.fingerprints["text_encoder"], "here")


def test_features_of_another_encoder_of_the_same_width_are_refused_before_anything_runs(
    place: Path, tmp_path: Path
) -> None:
    other = load_text_encoder(str(write_sentence_t5(tmp_path / "other", seed=1)))
    import_again(place, "reward-of-other", other.fingerprint)
    message = rf"text encoder {other.fingerprint[:12]}; got by .*prepare\.text_encoder=FOLDER"
    with pytest.raises(ConfigError, match=message):
        tune(place, tmp_path / "tuned", "kinematic", ALL, "reward-of-other")
    with pytest.raises(ConfigError, match=message):
        evaluate(place, tmp_path / "scores", "kinematic", ALL, reward="reward-of-other")
    assert not (tmp_path / "tuned").exists() and not list((tmp_path / "scores").rglob("*.npz"))


def test_an_encoder_known_by_name_only_is_said_to_be_unchecked(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    import_again(place, "reward-by-name", "sentence-t5-large")
    for run in (tune, evaluate):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(place, tmp_path / run.__name__, "kinematic", ALL, reward="reward-by-name")
        assert "no fingerprint of its text encoder (sentence-t5-large)" in caplog.text
    files = write_files(tmp_path / "wide", released_contents())
    command = ["import", "motionreward", str(files), "--dataset", str(place / "data"), "--out"]
    assert main([*command, str(tmp_path / "unknown")]) == 0
    assert "recorded by name only (sentence-t5-large)" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "narrow"), "--text-encoder", str(place / "sentence-t5")]) == 2
    assert "1024 features per token; got one of 24" in capsys.readouterr().err
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tune(place, tmp_path / "known", "kinematic", ALL)
    assert "fingerprint" not in caplog.text


# ------------------------------------------------------------------------- an adapter that never saw the motion


@pytest.mark.parametrize("weights", [{**ALL, "authenticity": 0.0}, {"semantic": 1.0}])
def test_a_term_without_weight_is_left_out_where_its_adapter_was_not_trained(
    place: Path, tmp_path: Path, weights: dict[str, float]
) -> None:
    logged = tune(place, tmp_path / "tuned", "rotation", weights)["last"]
    assert rewards_in(logged) >= {"semantic", "preference", "similarity", "total"}
    assert "authenticity" not in rewards_in(logged) and logged["optim/grad_norm"] > 0
    rows = evaluate(place, tmp_path / "scores", "rotation", weights, after=tmp_path / "tuned" / "model")
    for name in (BASE, "after"):
        assert rewards_in(rows[name]) == {"semantic", "preference", "similarity", "total"}
    assert "authenticity" in rewards_in(rows[REAL])  # the clips themselves are kinematic


def test_a_term_with_weight_is_refused_there_before_training_starts(place: Path, tmp_path: Path) -> None:
    message = "'rotation', on which this adapter was not trained.*set the weight of authenticity to 0"
    with pytest.raises(RepresentationError, match=message):
        tune(place, tmp_path / "tuned", "rotation", ALL)
    with pytest.raises(RepresentationError, match=message):
        evaluate(place, tmp_path / "scores", "rotation", ALL)
    assert not (tmp_path / "tuned").exists()
    assert [p.name for p in (tmp_path / "scores").rglob("*.npz")] == []


def test_the_terms_of_a_reward_depend_on_the_representation(place: Path) -> None:
    folders = {name: place / "reward" / name for name in ("preference", "authenticity")}
    whole = load_reward(place / "reward" / "backbone", folders)
    bare = load_reward(place / "reward" / "backbone", {})
    assert set(ALL) <= set(whole.terms_for(Representation.JOINT)) and "smoothness" in whole.terms_for("joint")
    assert set(ALL) - set(whole.terms_for(Representation.ROTATION)) == {"authenticity"}
    assert set(ALL) - set(bare.terms_for(Representation.JOINT)) == {"preference", "authenticity"}
    assert whole.terms_for("skeleton") == ()
    for kind in Representation:
        whole.check_terms(whole.terms_for(kind), kind)
    with pytest.raises(RepresentationError, match="skeleton"):
        whole.check_terms(["semantic"], "skeleton")


# ------------------------------------------------------------------------------------------------------- adapters


def test_a_generator_is_tuned_with_adapters_and_merged(place: Path, tmp_path: Path) -> None:
    """The adapter is small and bound to its base; loaded or merged it is the same model, and not the base."""
    base = place / "kinematic" / "model"
    recipe = FinetuneRecipe(
        EasyTune(window=1), {"semantic": 1.0}, num_steps=3, batches=2, batch_size=4, max_frames=30,
        optim=OptimConfig(lr=1e-2, warmup_steps=0), lora_rank=2, lora_alpha=5.0,
    )  # fmt: skip
    job = FinetuneJob(str(place / "data"), str(base), reward_of(place), recipe=recipe)
    finetune.run(LocalRuntime(), to_plain(job), tmp_path / "run", {})
    adapter = tmp_path / "run" / "model"
    found = load_checkpoint(adapter)
    assert found.card.kind == "generator-adapter" and all(".lora_" in name for name in found.snapshot.model)
    tuned, plain = load_generator(adapter).network.state_dict(), load_generator(base).network.state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert changed == {n.rpartition(".lora_")[0] + ".weight" for n in found.snapshot.model}

    assert main(["merge-adapters", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    merged = load_generator(tmp_path / "merged").network.state_dict()
    assert all(torch.equal(merged[name], tuned[name]) for name in tuned)
    assert main(["merge-adapters", str(base), "--out", str(tmp_path / "again")]) == 2
    with pytest.raises(CheckpointError, match="trained on"):
        load_generator(adapter, base=pretrain(place, "kinematic", "other", dropout=0.2))


# -------------------------------------------------------------------------------------------- a second text encoder


def test_a_generator_reads_its_own_encoder_and_the_reward_the_datasets(place: Path, tmp_path: Path) -> None:
    """A generator trained on added features is tuned and evaluated with them; without them it is refused."""
    prepare = ["prepare", "--source", "synthetic", "--out", str(tmp_path / "data"), "--backend", "single"]
    sizes = ["prepare.num_clips=24", "prepare.max_frames=30", f"prepare.text_encoder={place / 'sentence-t5'}"]
    assert main([*prepare, *sizes]) == 0
    before = Dataset.open(tmp_path / "data").manifest.fingerprint
    add = ["prepare", "--out", str(tmp_path / "data"), "--backend", "single", "--add-text", "stub"]
    assert main(add) == 0 and main(add) == 2  # only once
    data = Dataset.open(tmp_path / "data")
    stub = load_text_encoder("stub")
    assert data.manifest.fingerprint == before and set(data.added_texts()) == {stub.fingerprint}
    split = Split.open(str(data.root), "train", {}).prompting(stub.fingerprint)
    batch = split.batch([0, 3], [Representation.JOINT], 30, seed=1)
    torch.testing.assert_close(batch.prompt.pooled_BD, stub.encode(list(batch.captions)).pooled_BD)
    assert batch.text.pooled_BD.shape[1] == SENTENCE != batch.slice(1, 2).prompt.pooled_BD.shape[1]

    mdm = MDMConfig(latent_dim=16, layers=1, heads=2, ff=16)
    job = PretrainJob(
        str(data.root),
        generator=GeneratorConfig(model=mdm, max_frames=30),
        recipe=PretrainRecipe(TrainConfig(steps=1, batch_size=4), text_encoder="stub"),
    )
    run_pretrain(LocalRuntime(), to_plain(job), tmp_path / "stub", {})
    generator = load_generator(tmp_path / "stub" / "model")
    assert generator.spec.text_encoder == stub.fingerprint
    recipe = FinetuneRecipe(
        EasyTune(window=1), {"semantic": 1.0}, num_steps=2, batches=1, batch_size=4, max_frames=30, optim=OptimConfig()
    )
    tuned = FinetuneJob(str(data.root), str(tmp_path / "stub" / "model"), reward_of(place), recipe=recipe)
    finetune.run(LocalRuntime(), to_plain(tuned), tmp_path / "tuned", {})
    with pytest.raises(DataError, match="add-text"):  # the other dataset has no such features
        finetune.run(LocalRuntime(), to_plain(replace(tuned, dataset=str(place / "data"))), tmp_path / "no", {})
