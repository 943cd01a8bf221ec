"""Imported and exported MotionReward files against the recorded key lists and the recorded outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motionrft.cli.main import main
from motionrft.core.types import Condition, Representation, valid_mask
from motionrft.reward.motion_reward import MotionReward
from motionrft.reward.released import file_names
from motionrft.training.recipes.reward import load_backbone, load_reward
from motionrft.training.released import read_released
from tests.paths import shared_path
from tests.released_fixtures import random_tensors, write_files, write_statistics

pytestmark = pytest.mark.parity

REPRESENTATIONS = {"kinematic": "263", "joint": "22x3", "rotation": "135"}
SUFFIXES = pytest.mark.parametrize("suffix", ["", "_r128"])


def key_list(name: str) -> dict[str, Any]:
    path = shared_path(f"golden/keys/motionreward__{name.removesuffix('.pth')}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def recorded_contents(suffix: str) -> dict[str, dict[str, Any]]:
    """Return part -> content with random weights under the recorded names, in the recorded layout."""
    contents = {}
    for seed, (part, name) in enumerate(file_names(suffix).items()):
        keys = key_list(name)
        assert keys["file"] == name
        assert {dtype for _, _, dtype in keys["tensors"]} == {"float32"}
        tensors = random_tensors({key: tuple(shape) for key, shape, _ in keys["tensors"]}, seed)
        content: dict[str, Any] = {keys["tensor_root"][0]: tensors, "epoch": 3}
        content["metrics"] = {m: np.float64(0.5) if "ai_" in m else 0.5 for m in keys["top_level"]["metrics"]}
        content |= {name: keys[name] for name in ("model_config", "lora_rank", "lora_alpha") if name in keys}
        assert content.keys() == keys["top_level"].keys()
        contents[part] = content
    return contents


@SUFFIXES
def test_files_of_the_published_shape_are_imported_and_come_back_name_by_name(suffix: str, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "published", recorded_contents(suffix), suffix)
    stats, out, back = (str(tmp_path / n) for n in ("statistics", "out", "back"))
    write_statistics(Path(stats))
    command = ["import", "motionreward", str(folder), "--out", out, "--stats", stats, "--preset", "tiny"]
    assert main([*command, "--suffix", suffix]) == 0
    reward = load_reward(f"{out}/backbone", {n: f"{out}/{n}" for n in ("preference", "authenticity")})
    assert (reward.config.unified_dim, reward.config.latent_dim, reward.config.num_heads) == (256, 128, 4)
    assert reward.adapters is not None and reward.adapters.config.rank == (128 if suffix else 16)
    assert main(["export", "motionreward", out, "--out", back, "--suffix", suffix]) == 0
    for name in file_names(suffix).values():
        keys, want, got = key_list(name), read_released(folder / name), read_released(Path(back) / name)
        root = keys["tensor_root"][0]
        listed = {key: (tuple(shape), dtype) for key, shape, dtype in keys["tensors"]}
        assert {k: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in got[root].items()} == listed
        assert len(got[root]) == keys["n_tensors"] and sum(t.numel() for t in got[root].values()) == keys["n_values"]
        assert all(t.numpy().tobytes() == want[root][k].numpy().tobytes() for k, t in got[root].items())
        assert {k: v for k, v in got.items() if k != root} == {k: v for k, v in want.items() if k != root}


class Recorded:
    """The recorded weights as released files (rank 4, alpha 10: scale 2.5), imported through the command line."""

    def __init__(self, folder: Path) -> None:
        self.arrays = np.load(shared_path("golden/motionreward_tiny.npz"), allow_pickle=False)
        heads = {"encoder_num_heads": 4, "text_num_heads": 4}
        contents: dict[str, dict[str, Any]] = {"backbone": {"state_dict": self.group("sd/"), "model_config": heads}}
        for name, theirs in (("preference", "critic"), ("authenticity", "authenticity")):
            lora = {"lora_state_dict": self.group(f"lora/{theirs}/"), "lora_rank": 4, "lora_alpha": 10}
            contents |= {f"{name}/lora": lora, f"{name}/head": {"state_dict": self.group(f"head/{theirs}/")}}
        write_files(folder / "published", contents)
        stats = write_statistics(folder / "statistics")
        for names in (("Mean.npy", 263), ("Mean_22x3.npy", 3), ("Mean_135.npy", 135)):  # recorded motion is normalised
            np.save(stats / names[0], np.zeros(names[1]))
            np.save(stats / names[0].replace("Mean", "Std"), np.ones(names[1]))
        self.out = folder / "out"
        command = ["import", "motionreward", str(folder / "published"), "--out", str(self.out), "--stats", str(stats)]
        assert main(command) == 0
        self.lengths = torch.from_numpy(self.arrays["in/lengths"])

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        names = [n for n in self.arrays.files if n.startswith(prefix)]
        return {n.removeprefix(prefix): torch.from_numpy(self.arrays[n]) for n in names}

    def motion(self, name: str) -> torch.Tensor:
        motion = torch.from_numpy(self.arrays[f"in/motion_{REPRESENTATIONS[name]}"])
        return motion.flatten(2) if name == "joint" else motion

    def expect(self, name: str, got: torch.Tensor) -> None:
        gap = float(
            (got.detach().double() - torch.from_numpy(self.arrays[f"out64/{name}"]).reshape(got.shape)).abs().max()
        )
        assert gap <= 2e-5, f"{name}: difference {gap:.3g}"

    def reward(self) -> MotionReward:
        return load_reward(self.out / "backbone", {n: self.out / n for n in ("preference", "authenticity")})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_imported_towers_give_the_recorded_posteriors(recorded: Recorded, name: str) -> None:
    reward, r, t = recorded.reward(), REPRESENTATIONS[name], torch.from_numpy(recorded.arrays["in/t"])
    assert reward.adapters is not None and reward.merged is not None
    for adapter, group in ((None, "enc"), ("preference", "enc_critic"), ("authenticity", "enc_auth")):
        towers = [reward.motion if adapter is None else reward.merged[adapter]]
        with reward.adapters.using(adapter) as adapted:
            for tower in (*towers, adapted):
                for suffix, time in (("", None), ("_t", t)):
                    mu, logvar = tower(recorded.motion(name), recorded.lengths, name, time)
                    recorded.expect(f"{group}{suffix}/{r}_mu", mu)
                    recorded.expect(f"{group}{suffix}/{r}_logvar", logvar)


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_imported_scores_equal_the_recorded_ones(recorded: Recorded, name: str) -> None:
    reward, r, x = recorded.reward(), REPRESENTATIONS[name], recorded.motion(name)
    tokens = torch.from_numpy(recorded.arrays["in/text_tokens"])
    mask = valid_mask(torch.from_numpy(recorded.arrays["in/text_lengths"]), tokens.shape[1])
    text = reward.encode_text(Condition(tokens, mask, tokens[:, 0]))
    kind = Representation(name)
    target = reward.embed(x.flip(0), recorded.lengths.flip(0), kind)
    keys = {"semantic": "semantic", "similarity": "m2m", "preference": "critic"}
    keys |= {"authenticity": "preal"} if name != "rotation" else {}
    terms = reward.score(x, recorded.lengths, kind, text_BE=text, target_BE=target, terms=list(keys))
    for term, key in keys.items():
        recorded.expect(f"reward/{key}_{r}", terms.values[term])


def test_the_recorded_backbone_is_exported_bit_for_bit(recorded: Recorded, tmp_path: Path) -> None:
    assert main(["export", "motionreward", str(recorded.out), "--out", str(tmp_path)]) == 0
    got, want = read_released(tmp_path / file_names()["backbone"])["state_dict"], recorded.group("sd/")
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    lora = read_released(tmp_path / file_names()["authenticity/lora"])
    assert (lora["lora_rank"], lora["lora_alpha"]) == (4, 10)
    assert load_backbone(recorded.out / "backbone")[0].config.time_token == "none_when_clean"
