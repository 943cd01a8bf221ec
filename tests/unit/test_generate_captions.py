"""`motionrft generate`: prompts from files, the same motions whatever stands around them, BVH that plays the motion."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.sources.bvh_format import parse_bvh
from motionrft.cli.main import main
from motionrft.core.errors import ConfigError, DataError
from motionrft.core.plain import to_plain
from motionrft.core.types import Representation
from motionrft.generators.mdm import MDMConfig
from motionrft.generators.registry import GeneratorConfig
from motionrft.report.bvh import write_bvh
from motionrft.representations.convert import to_joints
from motionrft.training.recipes.common import TrainConfig
from motionrft.training.recipes.generate_captions import GenerateRequest, Prompt, generate_captions, read_prompts
from motionrft.training.recipes.generator import PretrainJob, PretrainRecipe, run_pretrain
from motionrft.training.runtime_local import LocalExecutor, LocalRuntime
from tests.prepare_fixtures import make_dataset


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model folder of a joint generator that has seen one batch."""
    root = tmp_path_factory.mktemp("captions")
    data = make_dataset(root / "data").root
    job = PretrainJob(
        str(data),
        generator=GeneratorConfig(MDMConfig(latent_dim=16, layers=1, heads=2, ff=16), max_frames=40, sampling_steps=3),
        recipe=PretrainRecipe(TrainConfig(steps=1, batch_size=4), representation="joint"),
    )
    run_pretrain(LocalRuntime(), to_plain(job), root / "made", {})
    return root / "made" / "model"


PROMPTS = [Prompt(f"a person does thing {i}", 0.5 + 0.1 * (i % 9), i % 2) for i in range(40)]


def made(model: Path, prompts: list[Prompt], **changes) -> Tensor:
    return generate_captions(LocalExecutor(), GenerateRequest(str(model), "stub", **changes), prompts).motion_NTD


def test_a_motion_depends_on_its_prompt_only(model: Path) -> None:
    """Other shards, orders, batch sizes and neighbours: the same motion; another sample number or seed: another."""
    whole, few = made(model, PROMPTS), made(model, PROMPTS[33:], batch_size=3)
    for i, prompt in enumerate(PROMPTS[33:]):
        frames = round(prompt.seconds * 20)
        torch.testing.assert_close(few[i, :frames], whole[33 + i, :frames], rtol=1e-5, atol=1e-5)
        assert not whole[33 + i, frames:].any()
    turned = made(model, PROMPTS[::-1])
    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-5, atol=1e-5)
    other = made(model, [Prompt(p.caption, p.seconds, p.sample + 5) for p in PROMPTS[:2]])
    assert (other[:, :10] - whole[:2, :10]).abs().mean() > 0.01
    assert (made(model, PROMPTS[:2], seed=1)[:, :10] - whole[:2, :10]).abs().mean() > 0.01


def test_steps_are_the_models_own_unless_given(model: Path) -> None:
    one = PROMPTS[:1]
    torch.testing.assert_close(made(model, one), made(model, one, num_steps=3), rtol=0, atol=0)
    assert not torch.allclose(made(model, one), made(model, one, num_steps=4), atol=1e-3)
    assert not torch.allclose(made(model, one), made(model, one, guidance=1.0), atol=1e-4)


def test_files_give_captions_with_their_seconds(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("walk\t2.5\n\n  sit down  \n", encoding="utf-8")
    assert read_prompts(path, 3.0, 2) == [Prompt("walk", 2.5, 0), Prompt("walk", 2.5, 1)] + [
        Prompt("sit down", 3.0, s) for s in (0, 1)
    ]
    path.write_text("walk\tlong\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 1"):
        read_prompts(path, 3.0)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="none"):
        read_prompts(path, 3.0)


def test_the_verb_writes_arrays_bvh_and_page_and_refuses_what_it_cannot_make(model: Path, tmp_path: Path) -> None:
    common = ["generate", "--model", str(model), "--text-encoder", "stub", "--backend", "single"]
    out = ["--out", str(tmp_path / "out")]
    assert main([*common, *out, "--captions", "a person waves", "--seconds", "1", "--samples", "2"]) == 0
    with np.load(tmp_path / "out" / "motions.npz") as file:
        assert file["joints"].shape == (2, 20, 22, 3) and str(file["representation"]) == "joint"
        assert np.abs(file["motion"][0] - file["motion"][1]).max() > 1e-3
    names = sorted(p.name for p in (tmp_path / "out" / "bvh").iterdir())
    assert names == ["0000_a_person_waves.bvh", "0001_a_person_waves.bvh"]
    assert (tmp_path / "out" / "motions.html").stat().st_size > 1000
    assert main([*common, *out, "--caption", "x", "--seconds", "9"]) == 2
    assert main([*common[:3], "--text-encoder", "minilm", "--backend", "single", *out, "--caption", "x"]) == 2
    assert main([*common, *out, "--captions", str(tmp_path / "none.txt")]) == 2


def poses(frames: int = 7) -> Tensor:
    """Return a rotation motion with every joint turned, far from gimbal lock."""
    import roma

    draw = torch.Generator().manual_seed(3)
    angles = 0.6 * torch.randn(frames, 22, 3, generator=draw, dtype=torch.float64)
    six = roma.rotvec_to_rotmat(angles)[..., :2].flatten(-2)
    root = torch.randn(frames, 3, generator=draw, dtype=torch.float64) * 0.3
    return torch.cat([root, six.flatten(-2)], dim=-1)


@pytest.mark.parametrize("kind", [Representation.ROTATION, Representation.JOINT])
def test_a_bvh_file_holds_the_motion(tmp_path: Path, kind: Representation) -> None:
    motion = poses()
    joints = to_joints(motion, Representation.ROTATION)
    if kind is Representation.JOINT:
        motion = joints.flatten(-2)
    residual = write_bvh(tmp_path / "a.bvh", motion, kind, 20.0)
    clip = parse_bvh((tmp_path / "a.bvh").read_bytes())
    order = [clip.joint(name) for name in _names()]
    assert clip.fps == pytest.approx(20.0) and residual < 1e-6
    np.testing.assert_allclose(clip.positions_TN3[:, order] / 100.0, joints.numpy(), atol=2e-5)


def _names() -> tuple[str, ...]:
    from motionrft.representations.skeleton import T2M

    return T2M.joint_names


def test_broken_motion_is_not_written(tmp_path: Path) -> None:
    motion = poses()
    motion[2, 4] = float("nan")
    with pytest.raises(DataError, match="finite"):
        write_bvh(tmp_path / "a.bvh", motion, Representation.ROTATION, 20.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_bvh(tmp_path / "file" / "a.bvh", poses(), Representation.ROTATION, 20.0)


@pytest.mark.slow
def test_a_compiled_network_makes_the_same_motion(model: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler: torch.compile needs one on CPU")
    torch.testing.assert_close(made(model, PROMPTS[:4], compiled=True), made(model, PROMPTS[:4]), rtol=1e-4, atol=1e-4)
