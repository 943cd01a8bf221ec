"""Whole training stages leave the same weights on one process, on two with DeepSpeed, and in micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.pairs import build_preference_pairs
from motionrft.data.manifest import Dataset
from motionrft.data.tables import ClipTable
from motionrft.training.checkpoint import load_checkpoint
from motionrft.training.metrics import read_metrics
from tests.prepare_fixtures import make_dataset
from tests.processes import launch

RECIPES = "motionrft.training.recipes"
TOLERANCE = 3e-5  # other summation orders, through three steps of AdamW
SIZES = {"unified_dim": 16, "latent_dim": 8, "num_layers": 3, "decoder_layers": 1, "num_heads": 2, "text_heads": 2,
         "ff_dim": 32, "proj_hidden": 16, "text_token_dim": 32, "max_positions": 80, "dropout": 0.0}  # fmt: skip
# Heavy weights on what couples the batch, so that a wrong factor cannot hide; a large epsilon, so that AdamW does not
# divide it away.
SEMANTIC = {"rec": 1.0, "cl": 1.0, "cra": 1.0, "cra_lat": 1.0, "cra_cl": 1.0, "kl": 0.1, "lat": 0.1}
OPTIM = {"lr": 1e-1, "schedule": "constant", "eps": 0.1}
STEPS = 3


def training(**changes: Any) -> dict[str, Any]:
    return {"steps": STEPS, "batch_size": 8, "log_every": 1, "optim": OPTIM, **changes}


def reward(dataset: Path, model: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    recipe = {"model": {**SIZES, **(model or {})}, "semantic": SEMANTIC, "train": training(**changes), "max_frames": 32}
    return {"dataset": str(dataset), "recipe": recipe}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of finished stages: NAME_wWORLD_mMICRO."""
    root = tmp_path_factory.mktemp("layouts")
    dataset, pairs = root / "data", root / "pairs"
    words = ("sway", "lean", "turn", "drift", "rock")
    distinct = {f"c{i:03d}": {"captions": (f"{words[i % 5]} number {i}", f"do {i}"), "class_name": f"sway|{i}"}
                for i in range(40)}  # fmt: skip
    make_dataset(dataset, 40, distinct)
    for split in ("train", "val"):
        build_preference_pairs(ClipTable.open(Dataset.open(dataset), split), pairs, split, seed=0)
    backbone = str(root / "semantic_w1_m1" / "model")
    generator = str(root / "pretrain_w1_m1" / "model")

    def job(name: str, fn: str, config: dict[str, Any], world: int, micro: int = 1) -> dict[str, Any]:
        place = root / f"{name}_w{world}_m{micro}"
        return {"fn": f"{RECIPES}.{fn}", "config": config, "folder": str(place)}

    def refine(mode: str, micro: int) -> dict[str, Any]:
        spl = {"mode": mode, "k": 1, "weight": 1.0, "refresh_every": 2}
        return {**reward(dataset), "backbone": backbone, "refine": {"spl": spl, "train": training(micro_batches=micro)}}

    def jobs(world: int, micro: int) -> list[dict[str, Any]]:
        made = [job("semantic", "reward:run_semantic", reward(dataset, micro_batches=micro), world, micro)]
        if micro == 1:
            made.append(job("evaluator", "evaluators:run", evaluator, world))
        sizes = {"latent_dim": 16, "layers": 1, "heads": 2, "ff": 32, "dropout": 0.0}
        mdm = {"class_path": "motionrft.generators.mdm_network.MDMConfig", "init_args": sizes}
        pretrain = {"dataset": str(dataset), "generator": {"max_frames": 32, "model": mdm},
                    "recipe": {"train": training(micro_batches=micro)}}  # fmt: skip
        made.append(job("pretrain", "generator:run_pretrain", pretrain, world, micro))
        made += [job(f"refine_{m}", "reward:run_semantic", refine(m, micro), world, micro) for m in MODES]
        lora = {"adapter": {"rank": 2, "dropout": 0.0}, "train": training(micro_batches=micro)}
        adapter = {"name": "preference", "backbone": backbone, "pairs": str(pairs), "recipe": lora}
        made.append(job("adapter", "reward:run_adapter", adapter, world, micro))
        if micro == 1:
            weights = {"semantic": 1.0, "smoothness": 0.1, "similarity": 0.5}
            easytune = {"class_path": "motionrft.finetune.strategies.easytune.EasyTune",
                        "init_args": {"window": 2, "variant": "step"}}  # fmt: skip
            recipe = {"strategy": easytune, "weights": weights, "num_steps": 4, "batches": 2, "batch_size": 8,
                      "max_frames": 32, "optim": {**OPTIM, "warmup_steps": 0}}  # fmt: skip
            tune = {"dataset": str(dataset), "generator": generator, "reward": {"backbone": backbone}, "recipe": recipe}
            made.append(job("finetune", "finetune:run", tune, world))
            average = {**recipe, "ema_decay": 0.5, "probe_every": 1, "probe_clips": 3, "snapshot_updates": [3]}
            made.append(job("average", "finetune:run", {**tune, "recipe": average}, world))
            bad = {**recipe, "weights": {**weights, "poison": 1.0}, "term_modules": ["tests.poison_term"]}
            if world == 2:
                made.append(job("poisoned", "finetune:run", {**tune, "recipe": bad}, world))
        return made

    evaluator = {"dataset": str(dataset), "name": "A",
                 "recipe": {"model": {}, "train": training(), "max_frames": 32}}  # fmt: skip
    launch(
        "tests.stage_worker", jobs(1, 1) + jobs(1, 2) + [j for j in jobs(1, 4) if "semantic" in j["folder"]], 1, root
    )
    sharded = {**job("refine_zero3", "reward:run_semantic", refine("bank", 2), 2, 2), "zero": 3}
    two = [*jobs(2, 1), *(j for j in jobs(2, 2) if "generator" not in j["fn"]), sharded]
    launch("tests.stage_worker", two, 2, root)
    return root


MODES = ("bank", "in_batch")
MICRO = [("semantic", 2), ("semantic", 4), ("pretrain", 2), ("adapter", 2), ("refine_bank", 2), ("refine_in_batch", 2)]
TWO = [(n, 1) for n in ("semantic", "evaluator", "pretrain", "adapter", "refine_bank", "refine_in_batch", "finetune")]
TWO.append(("average", 1))


def weights(stages: Path, name: str) -> dict[str, torch.Tensor]:
    folder = stages / name
    if name.startswith("evaluator"):
        folder = sorted((folder / "checkpoints").iterdir())[-1]
        return dict(load_checkpoint(folder, expected_kind="evaluator").snapshot.model)
    return dict(load_checkpoint(folder / "model").snapshot.model)


def assert_same(stages: Path, name: str, reference: str) -> None:
    got, want = weights(stages, name), weights(stages, reference)
    assert set(got) == set(want)
    worst = {key: float((got[key].float() - want[key].float()).abs().max()) for key in want}
    assert max(worst.values()) < TOLERANCE, {k: v for k, v in worst.items() if v >= TOLERANCE}


@pytest.mark.parametrize(("name", "micro"), MICRO)
def test_micro_batches_change_nothing_but_rounding(stages: Path, name: str, micro: int) -> None:
    assert_same(stages, f"{name}_w1_m{micro}", f"{name}_w1_m1")


@pytest.mark.parametrize(("name", "micro"), [*TWO, ("semantic", 2), ("adapter", 2), ("refine_bank", 2)])
def test_two_processes_change_nothing_but_rounding(stages: Path, name: str, micro: int) -> None:
    assert_same(stages, f"{name}_w2_m{micro}", f"{name}_w1_m1")


def test_mining_reads_weights_that_no_process_holds_whole(stages: Path) -> None:
    # ZeRO-3 and micro-batches, mined before and between steps: outside the engine's forward every weight is a shard
    assert_same(stages, "refine_zero3_w2_m2", "refine_bank_w1_m1")


def test_refinement_moves_the_weights_away_from_plain_training(stages: Path) -> None:
    moved = weights(stages, "refine_bank_w1_m1")
    start = weights(stages, "semantic_w1_m1")
    assert max(float((moved[k] - start[k]).abs().max()) for k in moved) > 100 * TOLERANCE
    rows = read_metrics(stages / "refine_bank_w1_m1" / "metrics.jsonl")
    assert any(row["spl/joint/wrong"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["semantic", "refine_in_batch"])
def test_the_logged_loss_does_not_depend_on_the_layout(stages: Path, name: str) -> None:
    logged = [
        [row["loss/total"] for row in read_metrics(stages / f"{name}_{layout}" / "metrics.jsonl")]
        for layout in ("w1_m1", "w1_m2", "w2_m2")
    ]
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
    assert logged[2] == pytest.approx(logged[0], rel=1e-4)


def test_probes_do_not_depend_on_the_layout_and_snapshots_are_the_average(stages: Path) -> None:
    found = []
    for layout in ("w1_m1", "w2_m1"):
        logged = [r for r in read_metrics(stages / f"average_{layout}" / "metrics.jsonl") if "probe/reward/total" in r]
        assert [row["step"] for row in logged] == [0, 1, 2]
        found.append([v for row in logged for n, v in sorted(row.items()) if n.startswith(("probe/r", "probe/u"))])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4)
    kept, last = (load_checkpoint(stages / "average_w2_m1" / n).snapshot for n in ("snapshots/updates_3", "model"))
    assert kept.optimizer_step == last.optimizer_step == 4
    assert all(torch.equal(kept.model[name], tensor) for name, tensor in last.model.items())


def test_a_bad_gradient_on_one_of_two_processes_is_refused_on_both(stages: Path) -> None:
    logged = read_metrics(stages / "poisoned_w2_m1" / "metrics.jsonl")
    # Means over processes: half a refusal would be one that happened on one of them only.
    assert [row["optim/skipped"] for row in logged] == [1.0, 0.0]
    assert [row["optim/refused_steps"] for row in logged] == [1.0, 1.0]
    assert all(row["reward/poison/raw"] == 0.0 for row in logged)
    got, start = weights(stages, "poisoned_w2_m1"), weights(stages, "pretrain_w1_m1")
    assert all(torch.isfinite(tensor).all() for tensor in got.values())
    assert any(not torch.equal(got[name], start[name]) for name in got)
