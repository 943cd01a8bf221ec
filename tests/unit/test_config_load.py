"""One resolved configuration from layers; every shipped preset and profile loads; messages teach."""

from __future__ import annotations

from pathlib import Path

import pytest

from motionrft.config.load import dump, merge, preset_names, resolve, set_field
from motionrft.config.profiles import profile_names
from motionrft.core.errors import ConfigError, MotionRFTError
from motionrft.finetune.strategies import DRaFT, EasyTune
from motionrft.generators.acmdm import ACMDMConfig
from motionrft.generators.mdm import MDMConfig


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves_and_its_dump_reproduces_it(name: str, tmp_path: Path) -> None:
    config = resolve(name)
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert resolve(files=[tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_resolves(name: str) -> None:
    assert resolve(profile=name).hardware.workers.num_workers >= 1


def test_flags_win_over_files_over_profile_over_preset(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("finetune: {batches: 7, batch_size: 6}\nseed: 3\n")
    second.write_text("finetune: {batches: 8}\n")
    config = resolve("quickstart", "gpu1", [first, second], ["--finetune.optim.lr=1e-5", "finetune.batch_size=4"])
    assert (config.finetune.batches, config.finetune.batch_size, config.seed) == (8, 4, 3)
    assert config.finetune.optim.lr == 1e-5 and config.finetune.optim.warmup_steps == 10
    assert config.hardware.workers.use_gpu


def test_a_layer_replaces_all_weights_and_a_flag_changes_one() -> None:
    assert set(resolve("paper").finetune.weights) == {"semantic", "preference", "authenticity", "similarity"}
    weights = resolve("quickstart", flags=["finetune.weights.similarity=0.1"]).finetune.weights
    assert weights["similarity"] == 0.1 and weights["smoothness"] == 0.1


def test_another_strategy_drops_the_fields_of_the_former_one() -> None:
    config = resolve("quickstart", flags=["finetune.strategy=DRaFT", "finetune.strategy.last_steps=4"])
    assert config.finetune.strategy == DRaFT(last_steps=4)
    assert resolve("quickstart", flags=["finetune.strategy.window=2"]).finetune.strategy == EasyTune(window=2)
    lower = {"s": {"class_path": "m.A", "init_args": {"x": 1}}}
    assert merge(lower, {"s": {"class_path": "A", "init_args": {"y": 2}}})["s"]["init_args"] == {"x": 1, "y": 2}
    assert merge(lower, {"s": {"class_path": "m.B"}})["s"] == {"class_path": "m.B"}


def test_another_variant_has_its_own_defaults_where_names_are_shared() -> None:
    assert MDMConfig().heads != ACMDMConfig().heads
    assert resolve(flags=["generator.model=ACMDMConfig"]).generator.model == ACMDMConfig()
    chosen = resolve("quickstart", flags=["generator.model=ACMDMConfig", "generator.model.layers=3"]).generator.model
    assert chosen == ACMDMConfig(layers=3)
    assert resolve(flags=["generator.model.layers=3"]).generator.model == MDMConfig(layers=3)


def test_setting_a_field_creates_levels_and_reaches_through_variants() -> None:
    values: dict = {"finetune": {"strategy": "DRaFT"}}
    set_field(values, "finetune.strategy.last_steps", 3)
    set_field(values, "a.b", 1)
    assert values == {"finetune": {"strategy": {"class_path": "DRaFT", "init_args": {"last_steps": 3}}}, "a": {"b": 1}}
    set_field(values, "finetune.strategy.init_args.last_steps", 5)  # as the YAML form spells it
    assert values["finetune"]["strategy"]["init_args"] == {"last_steps": 5}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("finetunee.batches=3", "Did you mean 'finetune'"),
        ("finetune.batchez=3", "batchez"),
        ("finetune.batches=many", "finetune.batches"),
        ("finetune.strategy.window=11", "window is 11, more than the 10 denoising steps"),
        ("finetune.weights.semantic=-1", "must not be negative"),
        ("finetune.weights.beauty=1", "unknown terms"),
        ("finetune.strategy=Magic", "strategy"),
        ("finetune.batches", "section.field=value"),
        ("hardware.workers.num_workers=0", "num_workers must be >= 1"),
        ("reward.model.num_layers=2", "num_layers must be odd"),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected(flag: str, words: str) -> None:
    with pytest.raises(MotionRFTError, match=words):
        resolve("quickstart", flags=[flag])


def test_unknown_presets_profiles_and_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="known: easytune, motionrft, paper"):
        resolve("papr")
    with pytest.raises(ConfigError, match="cpu2"):
        resolve(profile="cpu3")
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(files=[Path("absent.yaml")])


def test_an_unknown_variant_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'Nothing' is none of ACMDMConfig, .*MLDConfig"):
        resolve(flags=["generator.model=Nothing"])
