"""The quickstart's configuration, fitted to what the data holds."""

from __future__ import annotations

import logging

import pytest

from data_prep.pipeline import prepare
from data_prep.sources.synthetic_classes import all_classes
from motionrft.cli.quickstart import fitted
from motionrft.cli.quickstart_verb import FITTED
from motionrft.config.load import resolve
from motionrft.config.prepare import PrepareConfig
from motionrft.core.errors import ConfigError


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("fit") / "data"
    prepare(PrepareConfig(out=str(out), num_clips=60, families=("walk",), max_frames=80, text_encoder="stub"))
    return str(out)


def test_batches_shrink_to_a_small_training_split_and_nothing_else_changes(
    small: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = resolve("quickstart", None, [], [])
    with caplog.at_level(logging.WARNING):
        shrunk = fitted(config, small)
    assert "batches of pretrain, evaluator, reward lowered to" in caplog.text
    sizes = {getattr(shrunk, n).train.batch_size for n in ("pretrain", "evaluator", "reward")}
    assert len(sizes) == 1 and sizes.pop() in (40, 42, 44) and shrunk.finetune == config.finetune
    assert shrunk.prepare == config.prepare and shrunk.reward.model == config.reward.model
    tiny = resolve("smoke", None, [], ["pretrain.train.batch_size=2", "evaluator.train.batch_size=2"])
    assert fitted(tiny, small).pretrain == tiny.pretrain


def test_the_quickstart_has_enough_classes_and_other_sources_take_no_families() -> None:
    config = resolve("quickstart", None, [], [])
    assert len(all_classes(config.prepare.families)) >= 40
    with pytest.raises(ConfigError, match="families belongs to source synthetic"):
        resolve("quickstart", None, [], ["prepare.source=bvh", "prepare.path=x"])
    for source, fields in FITTED.items():
        found = resolve("quickstart", None, [], [f"prepare.source={source}", "prepare.path=x", *fields])
        assert found.prepare.families == ()
