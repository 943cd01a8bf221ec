"""HY-Motion from pre-training on a prepared dataset to a fine-tuned model, at tiny size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from motionrft.core.plain import to_plain
from motionrft.core.types import Condition, MotionBatch
from motionrft.finetune.strategies import DRaFT, EasyTune
from motionrft.generators.hymotion import HYMotionConfig, HYMotionGenerator
from motionrft.generators.lora import adapter_for, add_adapter
from motionrft.generators.registry import GeneratorConfig
from motionrft.generators.sampling import generate
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.common import TrainConfig
from motionrft.training.recipes.generator import GenerateJob, PretrainJob, PretrainRecipe, run_generate, run_pretrain
from motionrft.training.recipes.generator_files import load_generator
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.single import SingleEngine
from tests.finetune_fixtures import Toy, roll
from tests.hymotion_fixtures import CLEAN, KIND, RELEASED, SMALL, make, make_batch
from tests.prepare_fixtures import make_dataset

RUNTIME = LocalRuntime()
TINY = replace(CLEAN, width=32, frame_weight=1.0, train_frames=40, band_frames=10, zero_final=True)
FEATURES = slice(30, 40)  # of the joints' rotations


class Watched(SingleEngine):
    """Adds up the gradient norms of every parameter over the updates."""

    def step(self):
        self.norms = getattr(self, "norms", {})
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
                self.norms[name] = self.norms.get(name, 0.0) + norm
        return super().step()


def rollout(engine: SingleEngine, generator: HYMotionGenerator, batch: MotionBatch, step: int = 0, strategy=None):
    strategy = strategy or EasyTune(window=3, sweep_ratio=0.0)
    return roll(engine, generator, Toy(FEATURES), batch, strategy, num_steps=6, progress=0.5, step=step)


@pytest.mark.parametrize("config", [SMALL, CLEAN, RELEASED, replace(SMALL, checkpoint_blocks=True)], ids=str)
def test_fine_tuning_reaches_every_tensor_of_the_network(config: HYMotionConfig) -> None:
    generator = make(config)
    engine = Watched(generator.network, OptimConfig(lr=1e-4, schedule="constant"))
    metrics = rollout(engine, generator, make_batch())
    assert engine.steps == 3 and engine.skipped == 0 and all(math.isfinite(v) for v in metrics.values())
    assert min(engine.norms.values()) > 0, [name for name, norm in engine.norms.items() if norm == 0]


def test_low_rank_fine_tuning_reaches_every_adapter_and_nothing_else() -> None:
    generator = make(RELEASED)
    add_adapter(generator.network, adapter_for(generator.config, 2, 4.0))
    before = {name: p.detach().clone() for name, p in generator.network.named_parameters()}
    engine = Watched(generator.network, OptimConfig(lr=1e-2, schedule="constant"))
    rollout(engine, generator, make_batch())
    assert engine.norms and all(".lora_" in name and norm > 0 for name, norm in engine.norms.items())
    for name, parameter in generator.network.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name)


@pytest.mark.parametrize("strategy", [EasyTune(window=3), EasyTune(window=2, score="x_prev"), DRaFT(2)], ids=str)
def test_the_final_samples_reward_rises(strategy) -> None:
    generator, batch, reward = make(replace(SMALL, width=32)), make_batch(), Toy(FEATURES)
    engine = SingleEngine(generator.network, OptimConfig(lr=3e-3, schedule="constant"))

    def final_reward() -> float:
        motion = generate(generator, None, batch.text, batch.lengths_B, batch.keys_B, 6, seed=77)
        scores = reward.score(motion, batch.lengths_B, KIND, text_BE=batch.text.pooled_BD, terms=["semantic"])
        return float(scores.values["semantic"].mean())

    before = final_reward()
    for step in range(15):
        rollout(engine, generator, batch, step, strategy)
    assert final_reward() > before + 0.2 * abs(before)


def test_pretrained_on_a_dataset_it_generates_and_is_tuned(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    job = PretrainJob(
        str(tmp_path / "data"),
        generator=GeneratorConfig(model=TINY, max_frames=40, guidance=1.5),
        recipe=PretrainRecipe(
            TrainConfig(steps=60, batch_size=8, ema_decay=0.5, optim=OptimConfig(lr=3e-3, schedule="constant"))
        ),
    )
    result = run_pretrain(RUNTIME, to_plain(job), tmp_path / "base", {})
    assert result["loss"] < 1.8  # 2 at the start
    generate_job = GenerateJob(str(tmp_path / "data"), str(tmp_path / "base" / "model"), splits=("val",), num_steps=4)
    run_generate(RUNTIME, to_plain(generate_job), tmp_path / "made", {})
    with np.load(tmp_path / "made" / "val_0.npz") as file:
        assert file["motion"].shape[2] == 135 and np.isfinite(file["motion"]).all()
        height = file["motion"][0, : int(file["lengths"][0]), 1].mean()
    assert 0.5 < height < 1.3
    generator = load_generator(tmp_path / "base" / "model")
    assert isinstance(generator, HYMotionGenerator) and generator.config.token_dim == 32
    text = Condition(torch.randn(5, 3, 32), torch.ones(5, 3, dtype=torch.bool), torch.randn(5, 32))
    engine = SingleEngine(generator.network, OptimConfig(lr=1e-3, schedule="constant"))
    reward_text = replace(text, pooled_BD=text.pooled_BD[:, :10])
    batch = replace(make_batch(), text=reward_text, generator_text=text)
    assert rollout(engine, generator, batch)["optim/grad_norm"] > 0
