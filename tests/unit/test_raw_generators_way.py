"""MDM and MotionDiffuse from a dataset to a fine-tuned model at tiny sizes: pre-train, load, generate, roll out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from motionrft.core.plain import to_plain
from motionrft.core.types import Condition, MotionBatch, Representation, RewardTerms, valid_mask
from motionrft.finetune.step import Objective, rollout_step
from motionrft.finetune.strategies import DRaFT, EasyTune, ReFL, Strategy
from motionrft.generators.base import Generator, ModelConfig
from motionrft.generators.mdm_network import OFFICIAL, OFFICIAL_DECODER, OFFICIAL_DECODER_TOKENS, MDMConfig
from motionrft.generators.motiondiffuse import OFFICIAL as DIFFUSE_OFFICIAL
from motionrft.generators.motiondiffuse import MotionDiffuseConfig
from motionrft.generators.registry import GeneratorConfig
from motionrft.generators.sampling import generate
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.common import Split, TrainConfig
from motionrft.training.recipes.generator import PretrainJob, PretrainRecipe, load_generator, run_pretrain
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.single import SingleEngine
from tests.prepare_fixtures import make_dataset

KIND = Representation.KINEMATIC
TINY = {"latent_dim": 16, "layers": 1, "heads": 2, "ff": 16}
MODELS: dict[str, ModelConfig] = {
    "mdm": MDMConfig(**TINY),
    "mdm-encoder": replace(OFFICIAL, **TINY),
    "mdm-decoder": replace(OFFICIAL_DECODER, **TINY),
    "mdm-decoder-tokens": replace(OFFICIAL_DECODER_TOKENS, **TINY),
    "motiondiffuse": MotionDiffuseConfig(**TINY, text_width=8, text_heads=2, text_ff=8, positions=40),
    "motiondiffuse-noise": replace(DIFFUSE_OFFICIAL, **TINY, text_width=8, text_layers=1, text_heads=2, text_ff=8),
}
FROM_SCRATCH = ("mdm", "motiondiffuse")
SHIFTED = r".*[sc]a_block\.key\.bias"  # softmax over positions takes it out again: no gradient, ever


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dataset and every model after two steps of pre-training on it."""
    root = tmp_path_factory.mktemp("raw")
    make_dataset(root / "data", 20)
    for name, model in MODELS.items():
        job = PretrainJob(
            str(root / "data"),
            generator=GeneratorConfig(model=model, max_frames=40),
            recipe=PretrainRecipe(TrainConfig(steps=2, batch_size=4, optim=OptimConfig(schedule="constant"))),
        )
        run_pretrain(LocalRuntime(), to_plain(job), root / name, {})
    return root


def load(place: Path, name: str) -> Generator:
    """Return the model as fine-tuning trains it, with values in what starts at zero."""
    generator = load_generator(place / name / "model")
    draw = torch.Generator().manual_seed(3)
    for parameter in generator.network.parameters():
        if parameter.abs().max() < 0.02:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    for part in generator.config.kept_in_finetuning:
        generator.network.get_submodule(part).requires_grad_(False)
    return generator


def batch_of(place: Path) -> MotionBatch:
    return Split.open(str(place / "data"), "train", {}).batch(range(4), [KIND], 40)


class Near:
    """Reward: every valid frame near the caption's vector in its first features."""

    def encode_text(self, condition: Condition) -> Tensor:
        return condition.pooled_BD

    def score(
        self,
        motion_BTD: Tensor,
        lengths_B: Tensor,
        representation: Representation,
        *,
        text_BE: Tensor,
        noise_level: float = 0.0,
        target_BE: Tensor | None = None,
        terms: Sequence[str],
    ) -> RewardTerms:
        distance = (motion_BTD[..., : text_BE.shape[1]] - text_BE[:, None]).square().mean(-1)
        mask = valid_mask(lengths_B, distance.shape[1])
        near = -torch.where(mask, distance, 0.0).sum(1) / lengths_B
        return RewardTerms(dict.fromkeys(terms, near))


class Keeps(SingleEngine):
    """Remembers the gradients of the last step."""

    def step(self):
        self.kept = {name: p.grad.clone() for name, p in self.module.named_parameters() if p.requires_grad}
        return super().step()


def roll(place: Path, generator: Generator, strategy: Strategy, lr: float = 1e-3):
    engine = Keeps(generator.network, OptimConfig(lr=lr, schedule="constant"))
    metrics = rollout_step(
        engine,
        generator,
        None,
        Near(),
        batch_of(place),
        objective=Objective({"semantic": 1.0}),
        strategy=strategy,
        num_steps=6,
        progress=1.0,
        step=0,
        seed=0,
        collective=LocalRuntime(),
    )
    return engine, metrics


@pytest.mark.parametrize("name", MODELS)
def test_a_pretrained_model_comes_back_and_generates(place: Path, name: str) -> None:
    generator, batch = load_generator(place / name / "model"), batch_of(place)
    losses = [json.loads(line)["loss/total"] for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    assert losses and all(0 < loss < 20 for loss in losses)
    motion = generate(generator, None, batch.prompt, batch.lengths_B, batch.keys_B, 4, seed=0)
    assert motion.shape == batch.motions[KIND].shape and bool(motion.isfinite().all())
    for row, length in enumerate(batch.lengths_B.tolist()):
        assert motion[row, :length].abs().max() > 0 and not motion[row, length:].any()


@pytest.mark.parametrize("name", MODELS)
def test_fine_tuning_moves_every_trainable_tensor_and_nothing_else(place: Path, name: str) -> None:
    generator = load(place, name)
    before = {key: p.detach().clone() for key, p in generator.network.named_parameters()}
    engine, metrics = roll(place, generator, EasyTune(window=1))
    assert metrics["optim/skipped"] == 0
    largest = max(float(g.norm()) for g in engine.kept.values())
    silent = [key for key, g in engine.kept.items() if float(g.norm()) < 1e-7 * largest]
    assert [key for key in silent if not re.fullmatch(SHIFTED, key)] == []
    kept = generator.config.kept_in_finetuning
    assert set(engine.kept) == {key for key in before if not (kept and key.startswith(kept))}
    for key, parameter in generator.network.named_parameters():
        assert torch.equal(parameter, before[key]) == (key not in engine.kept) or re.fullmatch(SHIFTED, key), key
    assert bool(kept) == name.startswith("motiondiffuse")


@pytest.mark.parametrize("name", FROM_SCRATCH)
@pytest.mark.parametrize("strategy", [EasyTune(window=2, timesteps="last"), ReFL(last_steps=2), DRaFT(2)], ids=str)
def test_the_reward_of_the_sample_rises(place: Path, name: str, strategy: Strategy) -> None:
    generator, batch, reward = load(place, name), batch_of(place), Near()

    def final() -> float:
        motion = generate(generator, None, batch.prompt, batch.lengths_B, batch.keys_B, 6, seed=5)
        text_BE = reward.encode_text(batch.prompt)
        found = reward.score(motion, batch.lengths_B, KIND, text_BE=text_BE, terms=["semantic"])
        return float(found.values["semantic"].mean())

    before = final()
    for _ in range(6):
        roll(place, generator, strategy, lr=1e-2)
    assert final() > before


def test_the_frozen_text_tower_carries_no_graph(place: Path) -> None:
    generator, batch = load(place, "motiondiffuse"), batch_of(place)
    summary, tokens = generator.network.encode_text(batch.prompt.tokens_BLD, batch.prompt.mask_BL)
    assert not summary.requires_grad and not tokens.requires_grad
    assert isinstance(generator.network, nn.Module) and generator.network.out.weight.requires_grad
