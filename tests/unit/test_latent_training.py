"""Latent families learn: every weight is reached, losses fall, and stages follow one another through the recipes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.plain import to_plain
from motionrft.core.protocols import StepInfo
from motionrft.finetune.strategies import DRaFT, EasyTune
from motionrft.generators.base import Training
from motionrft.generators.lora import adapter_for, add_adapter
from motionrft.generators.mld import LatentGenerator, MLDGenerator
from motionrft.generators.motionlcm import MotionLCMGenerator
from motionrft.generators.registry import GeneratorConfig
from motionrft.generators.sampling import generate
from motionrft.training.checkpoint import load_checkpoint
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.common import Split, TrainConfig
from motionrft.training.recipes.generator import PretrainJob, PretrainRecipe, run_pretrain
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.single import SingleEngine
from tests.finetune_fixtures import Toy, roll
from tests.latent_fixtures import SMALL, SMALL_LCM, batch_of, small_lcm, small_mld
from tests.prepare_fixtures import make_dataset

RUNTIME = LocalRuntime()
STAGES = ("autoencoder", "generator", "distill")
STRATEGIES = [EasyTune(window=1), EasyTune(window=1, score="x_prev"), DRaFT(last_steps=0)]


def stage_of(name: str) -> tuple[LatentGenerator, Training]:
    """Return a generator and its stage, ready to learn."""
    teacher = small_mld()
    generator = small_lcm() if name == "distill" else teacher
    training = generator.training(name, teacher)
    training.network.requires_grad_(True)
    return generator, training


@pytest.mark.parametrize("name", STAGES)
def test_every_weight_learns_in_its_stage(name: str) -> None:
    _, training = stage_of(name)
    training.loss(training.network, batch_of(), 0, 0)[0].mean().backward()
    still = [n for n, p in training.network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("name", STAGES)
def test_losses_fall_on_a_few_clips(name: str) -> None:
    generator, training = stage_of(name)
    batch = batch_of()
    if name == "autoencoder":  # joints of random features drift far
        generator.config = replace(generator.config, joint_weight=0.01)
    optimizer = torch.optim.AdamW(training.network.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss = training.loss(training.network, batch, step % 3, 0)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if training.after_step is not None:
            training.after_step(dict(training.network.named_parameters()), step + 1)
        losses.append(float(loss.detach()))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_a_student_starts_as_its_teacher_and_its_target_follows() -> None:
    teacher, student = small_mld(seed=1), small_lcm(seed=2)
    teacher.latents.scale.fill_(0.4)
    teacher.network.train()
    training = student.training("distill", teacher)
    assert training.network is student.network and not teacher.network.training
    own = student.network.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in teacher.network.state_dict().items())
    # The projection of guidance is what the teacher does not have; it keeps its start.
    assert own["time_embedding.cond_proj.weight"].any()
    assert float(student.latents.scale) == pytest.approx(0.4)
    frozen = teacher.latents.vae.state_dict()
    assert all(torch.equal(t, frozen[name]) for name, t in student.latents.vae.state_dict().items())

    target = training.extras["target"]
    before = target.export_state()
    moved = {name: p.detach() + 1.0 for name, p in student.network.named_parameters()}
    training.after_step(moved, 1)
    after = target.export_state()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name] + 0.05, rtol=1e-4, atol=1e-5)
    target.import_state(before)
    assert all(torch.equal(t, before[name]) for name, t in target.export_state().items())


# ---------------------------------------------------------------------------------------------------------- fine-tuning


class Watching(SingleEngine):
    """Keeps the gradients of its last step."""

    gradients: dict[str, Tensor]

    def step(self) -> StepInfo:
        self.gradients = {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}
        return super().step()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("make", [small_mld, small_lcm])
def test_rewards_reach_every_weight_of_the_denoiser(make, strategy) -> None:
    generator: LatentGenerator = make()
    engine = Watching(generator.network, OptimConfig(lr=3e-3, schedule="constant"))
    before = {name: t.clone() for name, t in generator.frozen.state_dict().items()}
    batch, totals = batch_of(), []
    for _ in range(10):
        metrics = roll(engine, generator, Toy(), batch, strategy, num_steps=3)
        totals.append(metrics["reward/total"])
    weights = dict(generator.network.named_parameters())
    assert set(engine.gradients) == set(weights)
    assert [name for name, g in engine.gradients.items() if not g.any()] == []
    assert totals[-1] > totals[0] + 1e-3
    assert all(torch.equal(t, before[name]) for name, t in generator.frozen.state_dict().items())
    assert all(p.grad is None for p in generator.frozen.parameters())


@pytest.mark.parametrize("make", [small_mld, small_lcm])
def test_low_rank_adapters_find_the_blocks(make) -> None:
    generator: LatentGenerator = make()
    x, t, text = torch.randn(1, 2, 8), torch.tensor([3]), torch.randn(1, 12)
    inputs = (x, t, text) if make is small_mld else (x, t, text, torch.randn(1, 16))
    before = generator.network(*inputs)
    changed = add_adapter(generator.network, adapter_for(generator.config, rank=2, alpha=4.0))
    assert len(changed) == 3 * SMALL.layers and "encoder.middle_block.self_attn.out_proj" in changed
    assert torch.equal(generator.network(*inputs), before)


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dataset, an autoencoder, a denoiser on it, and a student of that."""
    root = tmp_path_factory.mktemp("latent")
    make_dataset(root / "data", 15)
    pretrain(root, "autoencoder")
    pretrain(root, "generator", autoencoder="autoencoder")
    pretrain(root, "distill", teacher="generator")
    return root


def pretrain(root: Path, stage: str, name: str = "", steps: int = 4, model=None, **folders: str) -> Path:
    train = TrainConfig(steps=steps, batch_size=4, checkpoint_every=2, optim=OptimConfig(lr=2e-3, schedule="constant"))
    model = model or (SMALL_LCM if stage == "distill" else SMALL)
    job = PretrainJob(
        str(root / "data"),
        generator=GeneratorConfig(model=model, max_frames=40),
        recipe=PretrainRecipe(train, stage=stage),
        **{role: str(root / folder / "model") for role, folder in folders.items()},
    )
    run_pretrain(RUNTIME, to_plain(job), root / (name or stage), {})
    return root / (name or stage) / "model"


def test_stages_follow_one_another_and_the_results_generate(place: Path) -> None:
    first, second, third = (
        load_generator(place / stage / "model") for stage in ("autoencoder", "generator", "distill")
    )
    assert isinstance(second, MLDGenerator) and isinstance(third, MotionLCMGenerator)
    assert float(first.latents.scale) not in (0.0, 1.0)
    for one in (second, third):
        found = one.latents.state_dict()
        assert all(torch.equal(t, found[name]) for name, t in first.latents.state_dict().items() if name in found)
    batch = Split.open(str(place / "data"), "val", {}).batch([0, 1], [second.spec.representation], 40)
    empty = Split.open(str(place / "data"), "val", {}).text.condition([""])
    assert torch.equal(second.latents.null, empty.pooled_BD[0]) and second.latents.null.any()
    for one in (second, third):
        for steps in (1, 4):
            motion = generate(one, None, batch.prompt, batch.lengths_B, batch.keys_B, steps, seed=0)
            assert motion.shape == (2, int(batch.lengths_B.max()), 263) and motion.isfinite().all()
    weights = [nn.utils.parameters_to_vector(one.network.parameters()) for one in (first, second)]
    assert (weights[0] != weights[1]).any()  # the autoencoder's folder holds an untrained denoiser


def test_an_interrupted_distillation_continues_with_its_target(place: Path) -> None:
    straight = load_checkpoint(place / "distill" / "model").snapshot.model
    parts = place / "parts"
    shutil.copytree(place / "distill", parts)
    first, last = sorted(parts.glob("checkpoints/step_*"))
    for folder in (last, parts / "model"):
        shutil.rmtree(folder)
    target = load_checkpoint(first).snapshot.extras["target"]
    student = load_checkpoint(first).snapshot.model
    assert any((t != student[name]).any() for name, t in target.items())
    pretrain(place, "distill", "parts", teacher="generator")
    found = load_checkpoint(parts / "model").snapshot.model
    assert all(torch.equal(t, found[name]) for name, t in straight.items())


def test_stages_out_of_order_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="autoencoder"):
        pretrain(place, "generator", "x1")
    with pytest.raises(ConfigError, match="teacher"):
        pretrain(place, "distill", "x2")
    with pytest.raises(ConfigError, match="distill"):
        pretrain(place, "generator", "x3", model=SMALL_LCM, autoencoder="autoencoder")
    with pytest.raises(CheckpointError, match="frozen parts"):
        pretrain(place, "generator", "x4", model=replace(SMALL, latent_tokens=3), autoencoder="autoencoder")
    with pytest.raises(ConfigError, match="width"):
        pretrain(place, "distill", "x5", model=replace(SMALL_LCM, width=32), teacher="generator")
