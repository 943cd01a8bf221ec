"""What is said of a reward model: retrieval, preference, authenticity, comparisons, and scores of motions in files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from data_prep.pairs import build_authenticity_pairs
from motionrft.cli.main import main
from motionrft.cli.reward import quality_tables
from motionrft.core.errors import ConfigError, DataError
from motionrft.core.types import Representation
from motionrft.data.pairs import PairTable
from motionrft.data.tables import TextTable
from motionrft.evaluation import reward_quality as quality
from motionrft.evaluation.published import published
from motionrft.reward.config import MotionRewardConfig
from motionrft.reward.objectives import SplConfig
from motionrft.training.recipes import ablate, score_motions
from motionrft.training.recipes.bank import LoserBank
from motionrft.training.recipes.common import Split
from motionrft.training.recipes.evaluate import RewardFolders
from motionrft.training.recipes.reward import RefineRecipe, RewardJob, RewardRecipe, load_backbone, run_semantic
from motionrft.training.recipes.reward_quality import QualityJob, _pairs
from motionrft.training.runtime_local import LocalExecutor, LocalRuntime
from tests.invariants.test_layouts import reward
from tests.prepare_fixtures import make_dataset

N = 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (dataset, backbone folder) of a tiny reward trained for three steps."""
    root = tmp_path_factory.mktemp("quality")
    # neighbours share a class, and some clips a caption: neither may be a wrong answer
    words = {
        f"c{i:03d}": {"captions": (f"clip {i} sways", f"number {i % 7}"), "class_name": f"sway|{i // 2}"}
        for i in range(40)
    }
    make_dataset(root / "data", 40, words)
    run_semantic(LocalRuntime(), reward(root / "data"), root / "reward", {})
    return root / "data", root / "reward" / "model"


def embeddings(noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    text = rng.standard_normal((N, 16))
    return text, text + noise * rng.standard_normal((N, 16))


def test_perfect_embeddings_retrieve_everything_and_random_ones_at_chance() -> None:
    text, motion = embeddings(0.0)
    args = (np.eye(N), np.arange(N), [str(i) for i in range(N)])
    for protocol in quality.retrieval(text, motion, *args).values():
        assert all(found.value == 100.0 and found.low == 100.0 for found in protocol.values())
    lost = np.random.default_rng(1).standard_normal(text.shape)
    found = quality.retrieval(text, lost, *args)
    for k in (1, 3, 10):
        assert found["pools32"][f"t2m_R@{k}"].value == pytest.approx(100 * k / 32, abs=9 * np.sqrt(k))
        assert found["all"][f"m2t_R@{k}"].value == pytest.approx(100 * k / N, abs=7 * np.sqrt(k))
    found = quality.retrieval(*embeddings(1.0), *args)["pools32"]["t2m_R@1"]
    assert found.low < found.value < found.high and found.half_width > 2.0


def test_directions_and_ranks_follow_the_recorded_example() -> None:
    # ranks of rows are 1, 1, 2, 4: R@1 50, R@2 75, R@3 75, R@5 100
    sims = np.array([[0.9, 0.1, 0.2, 0.3], [0.1, 0.8, 0.2, 0.3], [0.1, 0.7, 0.6, 0.3], [0.5, 0.6, 0.7, 0.4]])
    left, values, right = np.linalg.svd(sims)
    text, motion = left * np.sqrt(values), right.T * np.sqrt(values)
    # cosine needs unit rows: put what is missing into coordinates the other side does not have
    pad_t = np.diag(np.sqrt(4.0 - (text**2).sum(1)))
    pad_m = np.diag(np.sqrt(4.0 - (motion**2).sum(1)))
    text = np.hstack([text, pad_t, np.zeros((4, 4))])
    motion = np.hstack([motion, np.zeros((4, 4)), pad_m])
    found = quality.retrieval(text, motion, np.eye(4), np.full(4, -1), list("abcd"))
    assert set(found) == {"all", "all_similar"}  # four clips make no pool of 32
    recalls = [found["all"][f"t2m_R@{k}"].value for k in (1, 2, 3, 5)]
    assert recalls == [50.0, 75.0, 75.0, 100.0]
    columns = [sorted(sims[:, j], reverse=True).index(sims[j, j]) + 1 for j in range(4)]
    assert found["all"]["m2t_R@1"].value == 100.0 * np.mean(np.array(columns) == 1)


def test_a_near_duplicate_caption_counts_only_where_the_protocol_says_so() -> None:
    text, motion = embeddings(0.0)
    motion[[0, 1]] = motion[[1, 0]]  # each finds the other's
    sentence = np.eye(N)
    sentence[1] = sentence[0]
    found = quality.retrieval(text, motion, sentence, np.arange(N), [str(i) for i in range(N)])
    assert found["all"]["t2m_R@1"].value == pytest.approx(100 * (N - 2) / N)
    assert found["all_similar"]["t2m_R@1"].value == 100.0


def test_preference_counts_ties_as_wrong_and_swapping_changes_nothing_else() -> None:
    ids = [str(i) for i in range(200)]
    rng = np.random.default_rng(2)
    better = rng.standard_normal(200)
    worse = better - rng.standard_normal(200) - 0.5
    found = quality.preference(better, worse, ids)
    assert found["accuracy"].value == pytest.approx(100 * (better > worse).mean())
    assert 0 < found["precision"].value < 100 and found["accuracy"].low < found["accuracy"].value
    assert quality.preference([2.0, 0.0], [1.0, 0.0], ["a", "b"])["accuracy"].value == 50.0


def test_authenticity_of_a_separating_and_of_a_constant_detector() -> None:
    truth, ids = np.repeat([False, True], 50), [str(i % 50) for i in range(100)]
    found = quality.authenticity(np.where(truth, 1.0, -1.0), truth, ids)
    assert all(found[n].value == 100.0 for n in ("accuracy", "precision", "recall", "specificity", "f1", "auc"))
    found = quality.authenticity(np.full(100, -1.0), truth, ids)
    assert (found["recall"].value, found["specificity"].value, found["auc"].value) == (0.0, 100.0, 50.0)


def test_a_detector_that_only_reads_length_shows_in_the_buckets() -> None:
    captured, generated = np.arange(1, 61), np.arange(31, 91)
    lengths, truth = np.concatenate([captured, generated]), np.repeat([False, True], 60)
    ids = [str(i) for i in range(120)]
    # a quarter of the (captured, generated) pairs have both in 31..60, and are even there: 1 - 1/4 + 1/8
    assert quality.authenticity(lengths - 45.5, truth, ids)["auc"].value == pytest.approx(87.5)
    buckets = quality.length_buckets(lengths)
    assert sorted(np.concatenate([*buckets.values()])) == list(range(120))
    middle = list(buckets.values())[1]
    assert 31 <= lengths[middle].min() and lengths[middle].max() <= 60 and len(middle) >= 38
    measured = quality.authenticity(lengths[middle] - 45.5, truth[middle], [ids[i] for i in middle])
    assert measured["auc"].value == 50.0


def test_buckets_are_thirds_that_keep_equal_lengths_together() -> None:
    found = quality.length_buckets(np.tile([90, *range(1, 90)], 2))
    assert list(found) == ["1-30", "31-60", "61-90"] and [len(r) for r in found.values()] == [60] * 3
    assert {k: len(r) for k, r in quality.length_buckets([7] * 5).items()} == {"7-7": 5}
    few = quality.length_buckets([10, 10, 10, 10, 50])
    assert {k: r.tolist() for k, r in few.items()} == {"10-10": [0, 1, 2, 3], "50-50": [4]}


def test_authenticity_is_told_by_length_where_a_pair_has_one_length(trained: tuple[Path, Path], tmp_path: Path) -> None:
    clips = Split.open(str(trained[0]), "train", {}).clips
    rows = list(range(len(clips)))
    frames = [clips.frames(r, Representation.JOINT).copy() for r in rows]
    build_authenticity_pairs(
        clips, rows, frames, [len(f) for f in frames], Representation.JOINT, tmp_path, "val", seed=0
    )
    table = PairTable.open(tmp_path, "authenticity", "val")
    middle = float(table.lengths.double().median()) - 0.5

    class ReadsLength:
        config, trained_on = SimpleNamespace(representations=("joint",)), None

        def head_outputs(self, name, motion, lengths, kind):
            return torch.stack([torch.zeros(len(motion)), lengths - middle], dim=1)

    found = _pairs(ReadsLength(), table, QualityJob("", RewardFolders()), "cpu")
    assert found["joint"]["auc"]["value"] == 50.0 and found["joint"]["accuracy"]["value"] == 50.0
    short, *_, long = found["joint"]["by_length"].values()
    assert (short["specificity"]["value"], short["recall"]["value"], short["auc"]["value"]) == (100.0, 0.0, 50.0)
    assert (long["specificity"]["value"], long["recall"]["value"], long["auc"]["value"]) == (0.0, 100.0, 50.0)
    assert sum(b["clips"] for b in found["joint"]["by_length"].values()) == 2 * len(table)
    shown = quality_tables({"retrieval": {}, "authenticity": found})[-1]
    assert shown["title"].startswith("Authenticity by length") and len(shown["rows"]) == 3
    assert all(len(row) == len(shown["columns"]) for row in shown["rows"])


def test_printed_rows_are_consistent_with_themselves() -> None:
    for group in ("kinematic", "joint", "rotation"):
        row = published("I", group)
        recalls = [row[f"{d}_R@{k}"] for d in ("t2m", "m2t") for k in (1, 2, 3, 5, 10)]
        assert row["avg"] == pytest.approx(np.mean(recalls), abs=0.0051)
    assert published("I", "unknown") == {}


def test_the_bank_finds_what_a_plain_loop_over_all_motions_finds(trained: tuple[Path, Path]) -> None:
    dataset, folder = trained
    backbone, normalizers, _ = load_backbone(folder)
    split = Split.open(str(dataset), "train", {})
    spl = SplConfig(k=2)
    bank = LoserBank(split, normalizers, spl, 0.9, False, 32, LocalRuntime())
    bank.mine(backbone.eval())
    names, count = split.clips.item_ids, 0
    with torch.no_grad():
        for kind, scale in normalizers.items():
            mu = []
            for row in range(len(names)):
                motion = split.clips.motion(row, kind)[:32]
                x = scale.normalise(motion)[None]
                mu.append(backbone.motion(x, torch.tensor([len(motion)]), kind.value, torch.tensor(0))[0][0])
            bank_Nd = normalize(torch.stack(mu), dim=-1)
            for row in range(len(names)):
                for choice, caption in enumerate(split.clips.captions[row]):
                    text = split.text.condition([caption])
                    query = normalize(backbone.text(text.tokens_BLD, text.mask_BL)[0], dim=-1)[0]
                    rewards = (bank_Nd @ query).tolist()
                    wrong = {j: r for j, r in enumerate(rewards) if j != row and _wrong(split, caption, row, j)}
                    above = [j for j in wrong if wrong[j] > rewards[row]]
                    expected = max(wrong, key=wrong.__getitem__) if len(above) >= spl.k else -1
                    query_index = int(bank.offsets[row]) + choice
                    assert int(bank.table[kind.value][query_index]) == expected, (names[row], caption)
                    count += expected >= 0
    assert count > 10
    losers = bank.losers([3, 5], [1, 0], torch.device("cpu"))["joint"]
    queries = [int(bank.offsets[3]) + 1, int(bank.offsets[5])]
    columns = [int(bank.table["joint"][q]) for q in queries]
    assert losers.rows.tolist() == [i for i, c in enumerate(columns) if c >= 0]
    for place, column in zip(range(len(losers.rows)), [c for c in columns if c >= 0], strict=True):
        want = split.clips.motion(column, Representation.JOINT)[:32]
        assert torch.equal(losers.motion_HTD[place, : len(want)], want)


def _wrong(split: Split, caption: str, row: int, other: int) -> bool:
    if split.clips.class_ids[row] == split.clips.class_ids[other] >= 0:
        return False
    table: TextTable = split.text
    own = normalize(table.condition([caption]).pooled_BD, dim=-1)
    theirs = normalize(table.condition(split.clips.captions[other]).pooled_BD, dim=-1)
    return bool((own @ theirs.T).max() <= 0.8)


def test_sides_of_a_comparison_differ_in_one_thing() -> None:
    job = RewardJob("data", 0, RewardRecipe(model=MotionRewardConfig()))
    shared, *alone = ablate.sides("representations", job, RefineRecipe(), "")
    for side in alone:
        (only,) = side.job.recipe.model.representations
        model = replace(side.job.recipe.model, representations=shared.job.recipe.model.representations)
        assert replace(side.job, recipe=replace(side.job.recipe, model=model)) == shared.job and only in side.name
    plain, bank, in_batch = ablate.sides("spl", job, RefineRecipe(), "backbone")
    assert plain.job.refine.spl.weight == 0.0 < bank.job.refine.spl.weight
    assert (bank.job.refine.spl.mode, in_batch.job.refine.spl.mode) == ("bank", "in_batch")
    assert bank.job.refine.train == plain.job.refine.train
    with pytest.raises(ConfigError, match=r"inputs\.reward\.backbone"):
        ablate.sides("spl", job, RefineRecipe(), "")
    with pytest.raises(ConfigError, match="question"):
        ablate.sides("colour", job, RefineRecipe(), "")


def test_a_comparison_pairs_its_seeds_and_says_what_sharing_gains() -> None:
    job = RewardJob("data", 0, RewardRecipe())
    compared = [ablate.Side("shared", job), ablate.Side("joint alone", job)]

    def measured(value: float) -> dict:
        return {"retrieval": {"joint": {"all": {"avg": {"value": value}}}}}

    results = {
        **{f"shared_{i}_quality": measured(v) for i, v in enumerate((60.0, 70.0, 80.0))},
        **{f"joint_alone_{i}_quality": measured(v) for i, v in enumerate((50.0, 61.0, 69.0))},
    }
    found = ablate.compare(compared, 3, results)["joint"]["joint alone"]["difference"]["avg"]
    assert found["mean"] == pytest.approx(10.0)
    assert found["ci95"] == pytest.approx(4.302653 * 1.0 / np.sqrt(3), rel=1e-5)


def motions_file(path: Path, dataset: Path, **changes: np.ndarray) -> Path:
    split = Split.open(str(dataset), "val", {})
    batch = split.batch(range(len(split.clips)), [Representation.JOINT], 32)
    stored = {
        "motion": batch.motions[Representation.JOINT].numpy(),
        "lengths": batch.lengths_B.numpy(),
        "representation": np.array("joint"),
        "captions": np.array(batch.captions),
    }
    np.savez(path, **{k: v for k, v in {**stored, **changes}.items() if v is not None})
    return path


def test_scores_do_not_depend_on_how_motions_are_shared_out(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, folder = trained
    folders = RewardFolders(str(folder))
    path = motions_file(tmp_path / "m.npz", dataset)
    request = score_motions.ScoreRequest((path,), references=path, text_encoder="stub", weights={"semantic": 2.0})
    tables = []
    for size in (64, 3):
        monkeypatch.setattr(score_motions, "_SHARD", size)
        found = score_motions.score_motions(LocalExecutor(), folders, request, tmp_path / f"{size}.parquet")
        tables.append(pq.read_table(found["table"]).to_pydict())
    assert tables[0]["name"] == tables[1]["name"] and len(tables[0]["name"]) == found["motions"] == 8
    asked = replace(request, terms=("joint_jerk", "floor_penetration"), weights={"joint_jerk": 1.0, "semantic": 1.0})
    found = score_motions.score_motions(LocalExecutor(), folders, asked, tmp_path / "rules.parquet")
    assert set(found["mean"]) == {"joint_jerk", "floor_penetration", "total"} and found["mean"]["joint_jerk"] < 0
    for term in ("semantic", "similarity", "total"):
        assert tables[0][term] == pytest.approx(tables[1][term], abs=1e-6)
    assert tables[0]["similarity"] == pytest.approx([1.0] * 8, abs=1e-6)
    assert tables[0]["total"] == pytest.approx([2.0 * v for v in tables[0]["semantic"]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"representation": None}, "--representation"),
        ({"lengths": None}, "lengths"),
        ({"representation": np.array("kinematic")}, "263"),
        ({"captions": None}, "8 captions"),
        ({"lengths": np.zeros(8, dtype=np.int64)}, "length 0"),
        ({"motion": np.full((8, 32, 66), np.nan, dtype=np.float32)}, "not finite"),
    ],
)
def test_motions_that_cannot_be_scored_are_refused_by_name(
    trained: tuple[Path, Path], tmp_path: Path, changes: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = motions_file(tmp_path / "m.npz", trained[0], **changes)
    request = score_motions.ScoreRequest((path,), text_encoder="stub")
    with pytest.raises(DataError, match=message):
        score_motions.score_motions(LocalExecutor(), RewardFolders(str(trained[1])), request, tmp_path / "o.parquet")
    reward_flag = f"inputs.reward.backbone={trained[1]}"
    verb = ["reward", "score", "--backend", "single", "--run-dir", str(tmp_path / "run")]
    assert main([*verb, "--motions", str(path), reward_flag]) == 2
    assert "m.npz" in capsys.readouterr().err or message == "8 captions"


def test_reward_evaluate_prints_one_object_and_writes_a_page(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ["reward", "evaluate", "--backend", "single"]
    fields = [f"inputs.dataset={trained[0]}", f"inputs.reward.backbone={trained[1]}"]
    assert main([*verb, "--run-dir", str(tmp_path / "a"), "--json", "--noise-levels", "0,0.5", *fields]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["retrieval"]) == {f"{r.value}{n}" for r in Representation for n in ("", " noise 0.5")}
    assert main([*verb, "--run-dir", str(tmp_path / "b"), *fields]) == 0
    assert "paper, HumanML3D" in capsys.readouterr().out
    assert "Retrieval, text to motion" in (tmp_path / "b" / "report.html").read_text()


def test_reward_ablate_trains_both_sides_and_reports_the_difference(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = "{steps: 2, batch_size: 8, optim: {lr: 1.0e-3, schedule: constant, warmup_steps: 0}}"
    fields = [f"inputs.dataset={trained[0]}", f"inputs.reward.backbone={trained[1]}", f"refine.train={training}",
              "refine.spl.k=1", "refine.spl.weight=1.0"]  # fmt: skip
    verb = ["reward", "ablate", "--question", "spl", "--seeds", "2", "--backend", "single"]
    assert main([*verb, "--run-dir", str(tmp_path / "a"), *fields]) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    sides = summary["compared"]["joint"]
    assert list(sides) == ["without SPL", "SPL bank", "SPL in_batch"]
    assert "difference" in sides["SPL bank"] and "difference" not in sides["without SPL"]
    assert "Avg, difference" in capsys.readouterr().out
    weights = [load_backbone(tmp_path / "a" / f"{side}_0" / "model")[0].state_dict() for side in
               ("without_SPL", "SPL_bank")]  # fmt: skip
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("evaluate", ["--noise-levels", "a lot"], "--noise-levels takes numbers"),
        ("evaluate", ["--noise-levels", "0,1.5"], "noise_levels must lie in"),
        ("ablate", ["--question", "spl", "--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_wrong_options_of_the_reward_verbs_are_named(
    trained: tuple[Path, Path], tmp_path: Path, verb: str, options: list[str], message: str, capsys
) -> None:
    fields = [f"inputs.dataset={trained[0]}", f"inputs.reward.backbone={trained[1]}"]
    command = ["reward", verb, "--backend", "single", "--run-dir", str(tmp_path / "run"), *options, *fields]
    assert main(command) == 2 and message in capsys.readouterr().err
