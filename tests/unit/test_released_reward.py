"""Released MotionReward files: what comes in is what goes out, and what is wrong with them is said before anything is
written."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motionrft.cli.main import main
from motionrft.core.errors import CheckpointError, ConfigError, RepresentationError
from motionrft.core.plain import to_plain
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.data.normalizers import ARRAY_FILES, load_normalizers, read_array_normalizers
from motionrft.nn.text import StubEncoder
from motionrft.reward.backbone import RewardBackbone
from motionrft.reward.checkpoint_keys import backbone_rules, to_released
from motionrft.reward.config import PRESETS, AdapterConfig, MotionRewardConfig
from motionrft.reward.released import config_of, file_names, model_config_of
from motionrft.training.checkpoint import Card, Snapshot, load_checkpoint, save_checkpoint
from motionrft.training.recipes.released_reward import ImportChoices, export_motionreward, import_motionreward
from motionrft.training.recipes.reward import (
    ADAPTER,
    BACKBONE,
    AdapterJob,
    AdapterRecipe,
    RewardJob,
    RewardRecipe,
    load_backbone,
    load_reward,
    pack_normalizers,
)
from motionrft.training.released import read_released
from tests.prepare_fixtures import make_dataset
from tests.released_fixtures import (
    ALPHA,
    RANK,
    SMALL,
    released_contents,
    write_files,
    write_statistics,
)
from tests.reward_fixtures import make_adapted, make_backbone, make_batch

Contents = dict[str, dict[str, Any]]
FILES = file_names()
K, J, R = Representation


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    return write_statistics(tmp_path / "statistics")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_files(tmp_path / "published", released_contents())


def import_(folder: Path, out: Path, stats: Path, **choices: Any) -> dict[str, Path]:
    found = import_motionreward(folder, out, read_array_normalizers(stats), "encoder", ImportChoices(**choices))
    return dict(found.folders)


def adapters(folders: dict[str, Path]) -> dict[str, Path]:
    return {name: folders[name] for name in ("preference", "authenticity")}


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)


# ------------------------------------------------------------------------------------------------------------- import


def test_an_imported_reward_scores_like_the_weights_it_came_from(published: Path, tmp_path: Path, stats: Path) -> None:
    reward = load_reward((folders := import_(published, tmp_path / "out", stats))["backbone"], adapters(folders))
    batch, normalizers = make_batch(), read_array_normalizers(stats)
    backbone = make_backbone(SMALL)
    adapted = make_adapted(backbone, rank=RANK)
    for name in Representation:
        x = normalizers[name].normalise(batch.motions[name])
        with torch.no_grad():
            mu = backbone.motion(x, batch.lengths_B, name)[0]
            preference = adapted("preference", x, batch.lengths_B, name)[:, 0]
            logits = adapted("authenticity", x, batch.lengths_B, name)
        assert torch.allclose(reward.embed(batch.motions[name], batch.lengths_B, name), mu, atol=1e-6)
        terms = ("semantic", "preference") + (() if name is R else ("authenticity",))
        text = reward.encode_text(StubEncoder(1024).encode(list(batch.captions)))
        values = reward.score(batch.motions[name], batch.lengths_B, name, text_BE=text, terms=terms).values
        assert torch.allclose(values["preference"], preference, atol=1e-5)
        if name is not R:
            assert torch.allclose(values["authenticity"], logits.softmax(-1)[:, 0], atol=1e-5)


def test_authenticity_of_rotations_is_refused_because_the_published_adapter_never_saw_them(
    published: Path, tmp_path: Path, stats: Path
) -> None:
    folders = import_(published, tmp_path / "out", stats)
    reward, batch = load_reward(folders["backbone"], adapters(folders)), make_batch()
    with pytest.raises(RepresentationError, match="'rotation', on which this adapter was not trained"):
        reward.score(batch.motions[R], batch.lengths_B, R, text_BE=torch.ones(6, 8), terms=["authenticity"])
    card = load_checkpoint(folders["authenticity"]).card
    assert card.config["recipe"]["objective"]["representations"] == ["kinematic", "joint"]
    assert len(load_checkpoint(folders["preference"]).card.config["recipe"]["objective"]["representations"]) == 3


def test_the_cards_record_statistics_encoder_time_token_scale_and_source_files(
    published: Path, tmp_path: Path, stats: Path
) -> None:
    folders = import_(published, tmp_path / "out", stats)
    backbone = load_checkpoint(folders["backbone"])
    normalizers = read_array_normalizers(stats)
    assert backbone.card.fingerprints == {
        "text_encoder": "encoder",
        **{f"normalizer/{r.value}": normalizers[r].fingerprint for r in Representation},
    }
    assert backbone.card.config["recipe"]["model"]["time_token"] == "none_when_clean"
    origin = backbone.snapshot.state["origin"]
    assert origin["file"]["name"] == "stage1_retrieval_backbone.pth" and len(origin["file"]["sha256"]) == 64
    assert set(backbone.snapshot.state["statistics"]["joint"]["sha256"]) == {"Mean_22x3.npy", "Std_22x3.npy"}
    adapter = load_checkpoint(folders["authenticity"])
    assert adapter.card.config["recipe"]["adapter"] == {"rank": RANK, "alpha": float(ALPHA), "dropout": 0.1}
    assert adapter.snapshot.state["origin"]["lora"]["metrics"] == {"score": 0.95}
    assert len(adapter.card.fingerprints["backbone"]) == 64


def test_clean_motion_gets_the_time_token_only_if_that_is_chosen(published: Path, tmp_path: Path, stats: Path) -> None:
    for choice, policy in (("none", "none_when_clean"), ("0", "always")):
        out = tmp_path / f"out{choice}"
        command = ["import", "motionreward", str(published), "--out", str(out), "--stats", str(stats)]
        assert main([*command, "--clean-timestep", choice]) == 0
        net, _, checkpoint = load_backbone(out / "backbone")
        assert net.config.time_token == policy
        assert checkpoint.card.fingerprints["text_encoder"] == "sentence-t5-large"


def test_statistics_of_a_prepared_dataset_are_taken_with_their_provenance(published: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", 8)
    command = ["import", "motionreward", str(published), "--out", str(tmp_path / "out")]
    assert main([*command, "--dataset", str(tmp_path / "data")]) == 0
    want = load_normalizers(Dataset.open(tmp_path / "data"))
    _, normalizers, checkpoint = load_backbone(tmp_path / "out" / "backbone")
    assert {r: n.fingerprint for r, n in normalizers.items()} == {r: n.fingerprint for r, n in want.items()}
    assert checkpoint.snapshot.state["statistics"]["kinematic"]["n_frames"] == want[K].provenance["n_frames"]


def test_bare_tensors_old_head_names_and_left_over_names_are_understood(tmp_path: Path, stats: Path) -> None:
    contents = released_contents()
    want = contents["backbone"]["state_dict"]
    renamed = {n.replace(".linear1.", ".linear1.original_linear."): t for n, t in want.items()}
    renamed = {n.replace(".self_attn.", ".self_attn.original_mha.", 1): t for n, t in renamed.items()}
    foreign = ("clip.shared.weight", "critic_head.fc1.weight", "ai_detection_x", "proj_201.proj.0.bias",
               "final_layer_201.bias")  # fmt: skip
    contents["backbone"]["state_dict"] = renamed | {n: torch.zeros(2) for n in foreign}
    contents["preference/head"]["head_state_dict"] = contents["preference/head"].pop("state_dict")
    contents["authenticity/head"] = contents["authenticity/head"]["state_dict"]
    contents["preference/lora"] = contents["preference/lora"]["lora_state_dict"]
    folder = write_files(tmp_path / "published", contents)
    with pytest.raises(ConfigError, match="--lora-alpha"):
        import_(folder, tmp_path / "out", stats)
    folders = import_(folder, tmp_path / "out", stats, lora_alpha=float(ALPHA))
    assert same_tensors(to_released(load_backbone(folders["backbone"])[0].state_dict(), backbone_rules(SMALL)), want)


def test_head_counts_come_from_the_file_or_a_preset_and_are_never_guessed(tmp_path: Path, stats: Path) -> None:
    bare = write_files(tmp_path / "bare", released_contents(), change=lambda c: c["backbone"].pop("model_config"))
    with pytest.raises(ConfigError, match=r"encoder_num_heads.*Give --preset"):
        import_(bare, tmp_path / "out", stats)
    with pytest.raises(ConfigError, match=r"unified_dim is 16, tiny has 256.*Give another --preset"):
        import_(bare, tmp_path / "out", stats, preset="tiny")
    for name in sorted(set(PRESETS) - {"quickstart"}):
        with torch.device("meta"):
            tensors = to_released(RewardBackbone(PRESETS[name]).state_dict(), backbone_rules(PRESETS[name]))
        assert config_of(tensors, {}, name, "always", name) == PRESETS[name]
        with pytest.raises(ConfigError, match=rf"these sizes fit {name}\."):
            config_of(tensors, {}, "", "always", name)
        single = model_config_of(PRESETS[name]) | {"text_num_heads": 1}
        assert config_of(tensors, single, "", "always", name).text_heads == 1
        with pytest.raises(ConfigError, match="text_num_heads"):
            config_of(tensors, single, name, "always", name)


def test_a_projection_of_one_layer_has_no_index_and_still_round_trips(tmp_path: Path, stats: Path) -> None:
    config = replace(SMALL, proj_layers=1)
    contents = released_contents(config)
    assert "proj_263.proj.weight" in contents["backbone"]["state_dict"]
    folders = import_(write_files(tmp_path / "published", contents), tmp_path / "out", stats)
    assert load_backbone(folders["backbone"])[0].config.proj_layers == 1
    export_motionreward(folders, tmp_path / "back")
    for part, key in (("backbone", "state_dict"), ("preference/lora", "lora_state_dict")):
        assert same_tensors(read_released(tmp_path / "back" / FILES[part])[key], contents[part][key])


def test_numpy_scalars_of_both_numpy_generations_are_read(tmp_path: Path) -> None:
    torch.save({"metrics": {"f1": np.float64(0.75)}, "state_dict": {"w": torch.ones(2)}}, tmp_path / "two.pth")
    with (
        zipfile.ZipFile(tmp_path / "two.pth") as source,
        zipfile.ZipFile(tmp_path / "one.pth", "w", zipfile.ZIP_STORED) as target,
    ):
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(entry.filename, data)
    for name in ("one.pth", "two.pth"):
        assert float(read_released(tmp_path / name)["metrics"]["f1"]) == 0.75


# ------------------------------------------------------------------------------------------------------------- faults


class Attack:
    """Runs a command when it is unpickled without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("part", list(FILES))
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(
    part: str, tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    folder = write_files(
        tmp_path / "published", released_contents(), change=lambda c: c[part].update(metrics=Attack(marker))
    )
    command = ["import", "motionreward", str(folder), "--out", str(tmp_path / "out"), "--stats", str(stats)]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "system" in message and FILES[part] in message and "weights_only" not in message
    assert not marker.exists() and not (tmp_path / "out").exists()
    torch.load(folder / FILES[part], weights_only=False)  # noqa: TID251  the file does what the test says it does
    assert marker.exists()


def _replace(part: str, key: str, **tensors: torch.Tensor | None) -> Callable[[Contents], None]:
    """Return a change of named tensors; None removes one. Double underscores stand for dots."""

    def change(contents: Contents) -> None:
        for name, tensor in tensors.items():
            name = name.replace("__", ".")
            if tensor is None:
                del contents[part][key][name]
            else:
                contents[part][key][name] = tensor

    return change


def _stated(part: str, **values: Any) -> Callable[[Contents], None]:
    return lambda contents: contents[part].update(values)


def _config(**values: Any) -> Callable[[Contents], None]:
    return lambda contents: contents["backbone"]["model_config"].update(values)


def _other_rank(contents: Contents) -> None:
    other = released_contents(rank=RANK + 1)
    contents.update({name: other[name] for name in ("authenticity/lora",)})


FAULTS: dict[str, tuple[Callable[[Contents], Any], str]] = {
    "missing": (_replace("backbone", "state_dict", dist_layer__bias=None), r"missing \(1\): dist_layer.bias"),
    "extra": (_replace("backbone", "state_dict", surprise=torch.ones(1)), r"unexpected \(1\): surprise"),
    "mis-shaped": (
        _replace("backbone", "state_dict", global_motion_token=torch.ones(1, 15)),
        r"wrong shape \(1\): global_motion_token: expected \(1, 16\), got \(1, 15\)",
    ),
    "all three at once": (
        _replace(
            "backbone", "state_dict", dist_layer__bias=None, surprise=torch.ones(1), encoder__norm__bias=torch.ones(3)
        ),
        r"missing \(1\): dist_layer.bias; unexpected \(1\): surprise; wrong shape \(1\): encoder.norm.bias",
    ),
    "adapter lacks a tensor": (
        _replace("preference/lora", "lora_state_dict", critic_middle_block_ffn1__lora__lora_A=None),
        r"missing \(1\): critic_middle_block_ffn1.lora.lora_A",
    ),
    "adapter tensor mis-shaped": (
        _replace("authenticity/lora", "lora_state_dict", ai_proj_135_layer0__lora__lora_A=torch.ones(RANK, 134)),
        r"wrong shape \(1\): ai_proj_135_layer0.lora.lora_A",
    ),
    "head lacks a tensor": (_replace("preference/head", "state_dict", fc4__bias=None), r"missing \(1\): fc4.bias"),
    "head of another adapter": (
        _replace("preference/head", "state_dict", fc4__bias=torch.ones(2)),
        r"wrong shape \(1\): fc4.bias: expected \(1,\), got \(2,\)",
    ),
    "rank does not agree": (_stated("preference/lora", lora_rank=16), rf"rank {RANK}, as the.*lora_rank says 16"),
    "ranks of a set differ": (_other_rank, "adapters of one rank and alpha"),
    "alpha is no number": (_stated("preference/lora", lora_alpha="two"), "a positive lora_alpha; got 'two'"),
    "alpha is zero": (_stated("preference/lora", lora_alpha=0), "a positive lora_alpha"),
    "half precision": (
        _replace("backbone", "state_dict", dist_layer__bias=torch.ones(16).half()),
        "dist_layer.bias is float16",
    ),
    "not a number": (
        _replace("preference/head", "state_dict", fc4__bias=torch.tensor([float("nan")])),
        "fc4.bias holds NaN",
    ),
    "sizes contradict": (_config(latent_dim=128), "latent_dim is 128, the tensors say 8"),
    "one representation untrained": (_config(repr_types=["263", "22x3"]), r"leaves out \['135'\]"),
    "heads unknown": (_config(encoder_num_heads=None), "Give --preset"),
    "heads do not divide": (_config(encoder_num_heads=3), "num_heads must divide unified_dim"),
    "a file is missing": (lambda c: c.pop("preference/head"), r"no stage2_critic_head.pth"),
    "no tensors": (lambda c: c["backbone"].pop("state_dict"), "state_dict, or bare tensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_exit_code_2_and_nothing_is_written(
    fault: str, tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FAULTS[fault]
    folder = write_files(tmp_path / "published", released_contents(), change=change)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        import_(folder, tmp_path / "out", stats)
    command = ["import", "motionreward", str(folder), "--out", str(tmp_path / "out"), "--stats", str(stats)]
    assert main(command) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", list(FILES))
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_cut_file_is_named(part: str, kept: float, published: Path, tmp_path: Path, stats: Path) -> None:
    path = published / FILES[part]
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=rf"{FILES[part]}.*Download the file again"):
        import_(published, tmp_path / "out", stats)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_are_a_checkpoint_error_or_readable_never_a_traceback(tmp_path: Path, zipped: bool) -> None:
    path, rng = tmp_path / "file.pth", np.random.default_rng(0)
    content = {"state_dict": {"w": torch.ones(3)}, "metrics": {"f1": np.float64(0.5)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[int(rng.integers(min(len(whole), 900)))] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            read_released(path)
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_statistics_must_be_given_whole_and_of_the_right_shape(
    published: Path, tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", "motionreward", str(published), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--stats DIR" in capsys.readouterr().err
    np.save(stats / "Mean_22x3.npy", np.zeros(66))
    assert main([*command, "--stats", str(stats)]) == 2
    assert "(3,) per-axis statistics" in capsys.readouterr().err
    write_statistics(stats)
    np.save(stats / "Std.npy", np.zeros(263))
    assert main([*command, "--stats", str(stats)]) == 2
    assert "positive finite standard deviations" in capsys.readouterr().err
    for names in ARRAY_FILES.values():
        write_statistics(stats)
        (stats / names[1]).unlink()
        assert main([*command, "--stats", str(stats)]) == 2
        assert f"no {names[1]}" in capsys.readouterr().err
    (stats / "Std_135.npy").write_bytes(b"no array")
    assert main([*command, "--stats", str(stats)]) == 2
    assert "a numeric .npy array" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_suffix_is_suggested_and_must_agree_with_the_rank(tmp_path: Path, stats: Path) -> None:
    folder = write_files(tmp_path / "published", released_contents(), suffix="_r128")
    with pytest.raises(CheckpointError, match="--suffix '_r128'"):
        import_(folder, tmp_path / "out", stats)
    with pytest.raises(CheckpointError, match="file name says 128"):
        import_(folder, tmp_path / "out", stats, suffix="_r128")
    folder = write_files(tmp_path / "published", released_contents(), suffix=f"_r{RANK}")
    import_(folder, tmp_path / "out", stats, suffix=f"_r{RANK}")


def test_an_adapter_of_another_backbone_is_refused(published: Path, tmp_path: Path, stats: Path) -> None:
    own = import_(published, tmp_path / "own", stats)
    other = import_(write_files(tmp_path / "b", released_contents(seed=1)), tmp_path / "other", stats)
    for name in ("preference", "authenticity"):
        with pytest.raises(CheckpointError, match="Load the backbone it was trained on"):
            load_reward(own["backbone"], {name: other[name]})
        with pytest.raises(CheckpointError, match="Load the backbone it was trained on"):
            export_motionreward(own | {name: other[name]}, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_folders_in_use_are_left_alone(published: Path, tmp_path: Path, stats: Path) -> None:
    folders = import_(published, tmp_path / "out", stats)
    with pytest.raises(ConfigError, match="backbone, preference, authenticity in it"):
        import_(published, tmp_path / "out", stats)
    with pytest.raises(ConfigError, match="stage1_retrieval_backbone"):
        export_motionreward(folders, published)


def test_a_text_encoder_of_another_width_is_refused(
    published: Path, tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", "motionreward", str(published), "--out", str(tmp_path / "out"), "--stats", str(stats)]
    assert main([*command, "--text-encoder", "stub"]) == 2
    assert "1024 features per token; got one of 32" in capsys.readouterr().err
    assert main([*command, "--text-encoder", "unheard-of"]) == 2
    assert "unheard-of" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- export


def test_export_gives_back_names_bytes_rank_alpha_and_what_the_files_said(
    published: Path, tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_(published, tmp_path / "out", stats)
    assert main(["export", "motionreward", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    assert "statistics are not in these files" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "back").iterdir()} == set(FILES.values())
    for part, name in FILES.items():
        want, got = read_released(published / name), read_released(tmp_path / "back" / name)
        assert got.keys() == want.keys()
        for key, value in want.items():
            if key.endswith("state_dict"):
                assert same_tensors(got[key], value), name
            else:
                assert got[key] == value and type(got[key]) is type(value), (name, key)
        assert json.dumps(got.get("metrics")), part  # plain numbers: readable without any allow-listed global


def write_trained(folder: Path, config: MotionRewardConfig, stats: Path) -> dict[str, Path]:
    """Write checkpoints as the reward's training stages do."""
    backbone = make_backbone(config)
    adapted = make_adapted(backbone, rank=3)
    normalizers = {Representation(r): read_array_normalizers(stats)[Representation(r)] for r in config.representations}
    prints = {f"normalizer/{r.value}": n.fingerprint for r, n in normalizers.items()}
    card = Card(BACKBONE, to_plain(RewardJob("data", recipe=RewardRecipe(config))), {**prints, "text_encoder": "x"})
    extras = {"normalizers": pack_normalizers(normalizers)}
    save_checkpoint(folder / "reward" / "model", Snapshot(9, 9, backbone.state_dict(), {}, extras), card)
    for name in ("preference", "authenticity"):
        recipe = AdapterRecipe(AdapterConfig(rank=3, alpha=4.5))
        card = Card(ADAPTER, to_plain(AdapterJob(name, "b", "p", recipe=recipe)),
                    {**prints, "backbone": adapted.backbone_fingerprint})  # fmt: skip
        save_checkpoint(folder / name / "model", Snapshot(5, 5, adapted.adapter_state(name), {}), card)
    return {"backbone": folder / "reward" / "model", **{n: folder / n / "model" for n in adapted.heads}}


def test_a_reward_trained_here_is_exported_and_comes_back_the_same(
    tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, text_time=False, decoder_layers=1, text_token_dim=16)
    parts = write_trained(tmp_path / "run", config, stats)
    assert main(["export", "motionreward", str(tmp_path / "run"), "--out", str(tmp_path / "back")]) == 0
    notes = capsys.readouterr().out
    assert "16 features per token" in notes and "decoder has 1 blocks" in notes and "time_embedding_text" in notes
    lora = read_released(tmp_path / "back" / FILES["preference/lora"])
    assert (lora["lora_rank"], lora["lora_alpha"]) == (3, 4.5)
    with pytest.raises(ConfigError, match="a suffix for rank 3; got _r16"):
        export_motionreward(parts, tmp_path / "named", "_r16")
    command = ["import", "motionreward", str(tmp_path / "back"), "--out", str(tmp_path / "t5"), "--stats", str(stats)]
    assert main(command) == 2
    assert "16 features per token; got one of 1024" in capsys.readouterr().err  # Sentence-T5 is the default
    again = import_(tmp_path / "back", tmp_path / "again", stats)
    text_time = {n for n in load_backbone(again["backbone"])[0].state_dict() if n.startswith("text.time.")}
    assert len(text_time) == 4
    state = load_checkpoint(again["backbone"]).snapshot.model
    assert all(not state[n].any() for n in text_time)
    assert same_tensors(
        {n: t for n, t in state.items() if n not in text_time}, dict(load_checkpoint(parts["backbone"]).snapshot.model)
    )
    for name in ("preference", "authenticity"):
        assert same_tensors(
            dict(load_checkpoint(again[name]).snapshot.model), dict(load_checkpoint(parts[name]).snapshot.model)
        )


def test_a_reward_the_format_cannot_hold_is_refused_with_all_reasons(tmp_path: Path, stats: Path) -> None:
    parts = write_trained(
        tmp_path / "run", replace(SMALL, frames_per_token=2, representations=("joint", "kinematic")), stats
    )
    with pytest.raises(ConfigError, match=r"2 frames per token.*no projection of rotation"):
        export_motionreward(parts, tmp_path / "back")


def test_a_missing_adapter_is_named(tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = write_trained(tmp_path / "run", SMALL, stats)
    parts["preference"].rename(tmp_path / "elsewhere")
    command = ["export", "motionreward", str(tmp_path / "run"), "--out", str(tmp_path / "back")]
    assert main(command) == 2
    assert "no preference" in capsys.readouterr().err
    assert main([*command, "--preference", str(tmp_path / "elsewhere")]) == 0
    assert main([*command, "--out", str(tmp_path / "b2"), "--preference", str(parts["authenticity"])]) == 2
    assert "expected the preference adapter; got authenticity" in capsys.readouterr().err
