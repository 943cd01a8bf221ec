"""ACMDM from a prepared dataset through both pre-training stages to motion and a fine-tuning rollout, at tiny size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.plain import to_plain
from motionrft.core.types import Condition
from motionrft.diffusion.denoise import initial_noise
from motionrft.finetune.strategies import DRaFT, DRTune, EasyTune, ReFL
from motionrft.finetune.strategy import Strategy
from motionrft.generators.acmdm import ACMDMConfig, ACMDMGenerator
from motionrft.generators.registry import GeneratorConfig
from motionrft.generators.sampling import generate
from motionrft.training.optim import OptimConfig
from motionrft.training.recipes.common import TrainConfig
from motionrft.training.recipes.generator import PretrainJob, PretrainRecipe, load_generator, run_pretrain
from motionrft.training.runtime_local import LocalRuntime
from tests.acmdm_fixtures import JOINT, LATENT, MODELS, RAW, make, make_batch
from tests.finetune_fixtures import Toy, roll
from tests.prepare_fixtures import make_dataset

RUNTIME = LocalRuntime()
EACH = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acmdm") / "data"
    make_dataset(folder, 20)
    return folder


def pretrain(dataset: Path, folder: Path, config: ACMDMConfig, stage: str = "generator", **inputs: str) -> Path:
    job = PretrainJob(
        str(dataset),
        generator=GeneratorConfig(model=config, max_frames=30),
        recipe=PretrainRecipe(
            TrainConfig(steps=6, batch_size=4, ema_decay=0.9, validate_every=3, optim=OptimConfig(lr=1e-3)), stage=stage
        ),
        **inputs,
    )
    result = run_pretrain(RUNTIME, to_plain(job), folder, {})
    assert math.isfinite(result["loss"])
    return folder / "model"


def sampled(generator: ACMDMGenerator) -> Tensor:
    pooled = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    text = Condition(pooled[:, None], torch.ones(3, 1, dtype=torch.bool), pooled)
    return generate(generator, None, text, torch.tensor([30, 18, 5]), torch.arange(3), 4, seed=0)


def test_raw_models_are_trained_saved_and_generate(dataset: Path, tmp_path: Path) -> None:
    generator = load_generator(pretrain(dataset, tmp_path, RAW))
    assert generator.spec.family == "acmdm" and generator.spec.representation == JOINT
    assert bool(generator.network.final_layer.linear.weight.any())  # it started at zero
    motion = sampled(generator)
    assert motion.shape == (3, 30, 66) and bool(motion.isfinite().all()) and (motion[2, 5:] == 0).all()


def test_latent_models_are_trained_in_two_stages(dataset: Path, tmp_path: Path) -> None:
    first = pretrain(dataset, tmp_path / "ae", LATENT, "autoencoder")
    space = load_generator(first).frozen
    assert bool((space.std > 0).all()) and bool((space.std != 1).all())  # measured
    with pytest.raises(ConfigError, match=r"inputs\.autoencoder"):
        pretrain(dataset, tmp_path / "none", LATENT)
    wider = replace(LATENT, ae_width=12)
    with pytest.raises(CheckpointError, match="autoencoder"):
        pretrain(dataset, tmp_path / "wider", wider, autoencoder=str(first))
    generator = load_generator(pretrain(dataset, tmp_path / "gen", LATENT, autoencoder=str(first)))
    for name, tensor in generator.frozen.state_dict().items():
        assert torch.equal(tensor, space.state_dict()[name]), name
    assert bool(generator.network.final_layer.linear.weight.any())
    motion = sampled(generator)
    assert motion.shape == (3, 30, 66) and bool(motion.isfinite().all()) and (motion[2, 5:] == 0).all()


def test_keeping_an_autoencoder_on_the_way_does_not_disturb_its_training(dataset: Path, tmp_path: Path) -> None:
    """The average is measured and written at half-way; the weights that train are not the average."""
    made = []
    for name, longer in (("whole", 1.0), ("half", 2.0)):
        steps = TrainConfig(steps=round(6 / longer), batch_size=4, ema_decay=0.9, optim=OptimConfig(lr=1e-2))
        recipe = PretrainRecipe(
            replace(steps, optim=replace(steps.optim, schedule="constant")), longer, "", "autoencoder"
        )
        job = PretrainJob(str(dataset), generator=GeneratorConfig(model=LATENT, max_frames=30), recipe=recipe)
        run_pretrain(RUNTIME, to_plain(job), tmp_path / name, {})
        place = tmp_path / name / ("model" if longer == 1.0 else "model_long")
        made.append(load_generator(place).frozen.autoencoder.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def rollout(generator: ACMDMGenerator, strategy: Strategy, reward: Toy, lr: float = 1e-3) -> dict[str, float]:
    engine = RUNTIME.build_engine(generator.network, OptimConfig(lr=lr, schedule="constant"))
    return roll(engine, generator, reward, make_batch(), strategy, num_steps=5)


@EACH
@pytest.mark.parametrize(
    "strategy", [EasyTune(window=2), EasyTune(window=2, score="x_prev"), DRaFT(last_steps=2)], ids=str
)
def test_a_reward_reaches_every_tensor_of_the_network(
    name: str, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make(MODELS[name])
    silent: list[list[str]] = []
    real = type(RUNTIME.build_engine(generator.network, OptimConfig(schedule="constant"))).step

    def step(engine):
        named = engine.module.named_parameters()
        silent.append([n for n, p in named if p.grad is None or not bool(p.grad.any())])
        return real(engine)

    monkeypatch.setattr("motionrft.training.single.SingleEngine.step", step)
    before = {n: p.detach().clone() for n, p in generator.frozen.named_parameters()}
    metrics = rollout(generator, strategy, Toy())
    assert silent == [[]] * strategy.updates_per_rollout(5)
    assert metrics["optim/grad_norm"] > 0 and metrics["optim/skipped"] == 0
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in generator.frozen.named_parameters())


@EACH
@pytest.mark.parametrize("strategy", [EasyTune(window=3), ReFL(last_steps=2), DRTune(grad_steps=2)], ids=str)
def test_fine_tuning_raises_the_reward_of_final_samples(name: str, strategy: Strategy) -> None:
    generator, batch, reward = make(MODELS[name], guidance=1.5), make_batch(), Toy()

    def final() -> float:
        motion = generate(generator, None, batch.text, batch.lengths_B, batch.keys_B, 5, seed=0)
        terms = reward.score(motion, batch.lengths_B, JOINT, text_BE=batch.text.pooled_BD, terms=["semantic"])
        return float(terms.values["semantic"].mean())

    before = final()
    for _ in range(15):
        rollout(generator, strategy, reward, lr=3e-3)
    assert final() > before + 0.1 * abs(before)


def test_a_reward_of_noisy_states_reads_them_at_unit_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    # A perfect network keeps every state on the line from its noise to one known motion.
    generator, batch, reward = make(guidance=1.0), make_batch(), Toy()
    clean = generator.encode(batch.motions[JOINT], batch.lengths_B)
    weight = generator.network.final_layer.linear.bias

    def perfect(_network, x: Tensor, t: Tensor, *_: object) -> Tensor:
        return (clean - x) / (1 - t.float()) + 0.0 * weight.sum()

    monkeypatch.setattr(generator, "predict", perfect)
    rollout(generator, EasyTune(window=5, score="x_prev"), reward)
    noise = initial_noise(batch.keys_B, generator.state_shape(16), 0, "rollout", 0)
    assert reward.noise_levels == generator.solver(5).noise_level[1:].tolist()
    for motion, level in zip(reward.motions, reward.noise_levels, strict=True):
        want = generator.decode(math.sqrt(1 - level**2) * clean + level * noise, batch.lengths_B)
        torch.testing.assert_close(motion, want, rtol=1e-4, atol=1e-4)
    assert 0 < reward.noise_levels[0] < 1 and reward.noise_levels[-1] == 0.0
