"""Ray: two workers train what one process trains, a killed worker costs time only, small or absent clusters explain."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from motionrft.config.hardware import HardwareConfig, RayConfig, WorkersConfig, ZeroConfig
from motionrft.config.load import apply_overrides
from motionrft.core.errors import ClusterError, ConfigError, DataError, NumericalError
from motionrft.runtime.data import check_object_store, load_blocks, uncompressed_bytes
from motionrft.runtime.executor import RayExecutor
from motionrft.runtime.session import check_capacity, ray_session
from motionrft.runtime.train import run_on_ray
from motionrft.runtime.tune import run_search
from motionrft.runtime.tune_search import SearchConfig, to_domain
from motionrft.training.metrics import read_metrics
from motionrft.training.runtime_local import LocalRuntime
from motionrft.training.stages import Stage
from tests.ray_stages import coupled

COUPLED = "tests.ray_stages:coupled"
TOLERANCE = 2e-6


def hardware(stage: int = 1, workers: int = 2, cpus: float = 0.5, **ray_options) -> HardwareConfig:
    return HardwareConfig(
        launcher="ray",
        workers=WorkersConfig(num_workers=workers, cpus_per_worker=cpus),
        zero=ZeroConfig(stage=stage),
        ray=RayConfig(extra_cpus=2, **ray_options),
    )


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(hardware()):
        yield


@pytest.fixture(scope="module")
def local_loss(tmp_path_factory: pytest.TempPathFactory) -> float:
    return coupled(LocalRuntime(), {"batches": 6}, tmp_path_factory.mktemp("local"), {})["loss"]


@pytest.fixture
def parquet(tmp_path: Path) -> list[Path]:
    files = []
    for part, rows in enumerate([300, 1, 40]):  # uneven, so that parallel reads finish out of order
        ids = [f"{part}_{row}" for row in range(rows)]
        table = pa.table({"item_id": ids, "kinematic": [[float(part)] * 263] * rows, "unused": list(range(rows))})
        files.append(tmp_path / f"part-{part:05d}.parquet")
        pq.write_table(table, files[-1], use_dictionary=False, row_group_size=50)
    return files


@pytest.mark.ray
def test_two_workers_equal_one_process_and_stages_share_one_group(
    session: None, tmp_path: Path, local_loss: float, parquet: list[Path]
) -> None:
    blocks = load_blocks(parquet, ["item_id", "kinematic"])
    results = run_on_ray(
        [Stage("first", COUPLED, {"batches": 6}), Stage("second", COUPLED, {"batches": 6})],
        hardware=hardware(),
        run_dir=tmp_path / "run",
        datasets={"clips": blocks},
    )
    for name in ("first", "second"):
        assert results[name]["loss"] == pytest.approx(local_loss, abs=TOLERANCE)
        assert results[name]["steps"] == 12 and results[name]["rows"] == 341
        assert [row["step"] for row in read_metrics(tmp_path / "run" / name / "metrics.jsonl")] == list(range(1, 7))
    assert results["first"]["pid"] == results["second"]["pid"]

    with pytest.raises(ConfigError, match="--resume"):
        run_on_ray([Stage("first", COUPLED, {"batches": 6})], hardware=hardware(), run_dir=tmp_path / "run")


@pytest.mark.ray
@pytest.mark.slow
def test_killed_worker_resumes_to_the_same_loss_and_finished_stages_are_not_repeated(
    session: None, tmp_path: Path, local_loss: float
) -> None:
    stages = [Stage("first", COUPLED, {"batches": 6}), Stage("second", COUPLED, {"batches": 6, "kill_at": 3})]
    results = run_on_ray(stages, hardware=hardware(stage=2), run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "second" / "killed").exists()
    assert results["second"]["loss"] == pytest.approx(local_loss, abs=TOLERANCE)
    assert results["first"]["loss"] == pytest.approx(local_loss, abs=TOLERANCE)
    assert results["first"]["pid"] != results["second"]["pid"]  # the first ran before the restart, once
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "second" / "metrics.jsonl")] == list(range(1, 7))


@pytest.mark.ray
@pytest.mark.slow
def test_a_stages_own_error_comes_back_as_raised_after_one_restart(session: None, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="stage only: reward is not finite for items walk_07"):
        run_on_ray([Stage("only", COUPLED, {"batches": 6, "refuse_at": 3})], hardware=hardware(), run_dir=tmp_path)
    assert (tmp_path / "only" / "refused").read_text() == "xx"  # the first start and one restart, not more


@pytest.mark.ray
def test_blocks_keep_file_and_row_order_and_only_the_asked_columns(session: None, parquet: list[Path]) -> None:
    tables = ray.get(load_blocks(parquet, ["item_id"]))
    ids = [item for table in tables for item in table.column("item_id").to_pylist()]
    assert ids == [f"{part}_{row}" for part, rows in enumerate([300, 1, 40]) for row in range(rows)]
    assert {name for table in tables for name in table.column_names} == {"item_id"}


@pytest.mark.ray
def test_executor_keeps_order_and_dependencies_and_returns_our_errors(session: None, tmp_path: Path) -> None:
    executor = RayExecutor(2)
    assert executor.map_shards(lambda n: n * n, list(range(7))) == [n * n for n in range(7)]

    def process(shard: int) -> int:
        return os.getpid()

    processes = {*executor.map_shards(process, list(range(7)))}

    def needs_its_base(shard: int) -> bool:
        place = tmp_path / "base"
        if shard == 0:
            time.sleep(0.5)
            place.touch()
        return place.exists()

    # shard 1 may overtake the base, shards 2 and 3 may not
    assert executor.map_shards(needs_its_base, [0, 1, 2, 3], after=[None, None, 0, 0])[2:] == [True, True]
    with pytest.raises(ValueError, match="earlier"):
        executor.map_shards(needs_its_base, [0, 1], after=[1, None])

    def broken(shard: int) -> int:
        raise DataError(f"clip {shard} is broken")

    with pytest.raises(DataError, match="clip 5 is broken"):
        executor.map_shards(broken, [5])
    processes |= {*executor.map_shards(process, list(range(7)))}
    assert len(processes) <= 2  # the same two over all calls, an error included
    with pytest.raises(DataError, match="is broken"):
        executor.map_shards(lambda n: broken(n) if n else time.sleep(60), [0, 1])
    assert executor.map_shards(lambda n: -n, [1, 2, 3]) == [-1, -2, -3]  # one actor was ended, another took its place


@pytest.mark.ray
def test_search_writes_a_table_and_a_configuration_and_continues(session: None, tmp_path: Path) -> None:
    def trial(overrides, report):
        for number in range(4):
            report({"loss/total": (overrides["reward.weight"] - 0.3) ** 2 + 1 / (number + 1)})
        return {"loss/total": (overrides["reward.weight"] - 0.3) ** 2}

    space = {"reward.weight": {"grid": [0.0, 0.25, 0.9]}, "optim.lr": 0.1}
    config = SearchConfig("loss/total", num_samples=1, max_reports=5, cpus_per_trial=1)
    result = run_search(trial, space, config, tmp_path, base_config={"optim": {"eps": 1e-8}})
    assert result.best == {"reward.weight": 0.25, "optim.lr": 0.1}
    assert result.best_value == pytest.approx(0.0025)
    assert len(json.loads((tmp_path / "results.json").read_text())) == 3
    assert (tmp_path / "results.csv").read_text().count("\n") == 4
    assert "weight: 0.25" in (tmp_path / "best_config.yaml").read_text()
    with pytest.raises(ConfigError, match="--resume"):
        run_search(trial, space, config, tmp_path)


@pytest.mark.ray
def test_session_too_small_for_the_workers_is_refused_with_numbers(session: None) -> None:
    with pytest.raises(ClusterError, match=r"3 workers x 2 CPU \+ 1 for data tasks = 7 CPUs, the cluster has 3"):
        with ray_session(hardware(workers=3, cpus=2)):
            pass
    assert ray.is_initialized()  # the inner call did not start it, so it did not stop it


def test_missing_gpus_are_named() -> None:
    config = HardwareConfig("ray", WorkersConfig(num_workers=2, gpus_per_worker=1, use_gpu=True))
    with pytest.raises(ClusterError, match="= 2 GPUs, the cluster has 1"):
        check_capacity(config, {"CPU": 8, "GPU": 1})
    check_capacity(config, {"CPU": 3, "GPU": 2})


_CONNECT = """
import sys
from motionrft.config.hardware import HardwareConfig, RayConfig
from motionrft.core.errors import ClusterError
from motionrft.runtime.session import ray_session
config = HardwareConfig("ray", ray=RayConfig(address=sys.argv[1], connect_timeout_s=float(sys.argv[2])))
try:
    with ray_session(config):
        pass
except ClusterError as error:
    print("CLUSTER ERROR", error, flush=True)
"""


def connect(address: str, timeout_s: float) -> tuple[str, float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _CONNECT, address, str(timeout_s)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr, time.monotonic() - started


def test_address_where_nobody_listens_is_a_clear_error_within_the_timeout() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output, seconds = connect(f"127.0.0.1:{port}", 2)
    assert f"CLUSTER ERROR no Ray cluster answered at '127.0.0.1:{port}' within 2 s" in output
    assert "ray status" in output and seconds < 20


def test_listener_that_is_not_ray_is_a_clear_error_within_the_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        output, seconds = connect(f"127.0.0.1:{silent.getsockname()[1]}", 4)
    assert "CLUSTER ERROR no Ray cluster answered" in output, output
    assert seconds < 30


def test_object_store_too_small_is_refused_with_numbers(parquet: list[Path]) -> None:
    needed = uncompressed_bytes([str(f) for f in parquet], ["kinematic"])
    assert needed >= 341 * 263 * 8 * 0.99  # doubles here; runs of one value keep definition levels tiny
    with pytest.raises(ClusterError, match=r"object_store_gib"):
        check_object_store(needed, needed)
    check_object_store(needed, 2 * needed)


def test_absent_column_and_foreign_file_are_data_errors(parquet: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column rotation"):
        uncompressed_bytes([str(parquet[0])], ["rotation"])
    foreign = tmp_path / "x.parquet"
    foreign.write_text("hello")
    with pytest.raises(DataError, match="not a readable Parquet"):
        uncompressed_bytes([str(foreign)], ["item_id"])


@pytest.mark.parametrize(
    "spec", [{"unknown": [1]}, {"uniform": 3}, {"uniform": [1, 2], "choice": [1]}, {"uniform": [1]}]
)
def test_wrong_distributions_are_config_errors(spec: dict) -> None:
    with pytest.raises(ConfigError):
        to_domain(spec)


def test_overrides_do_not_touch_the_base() -> None:
    base = {"a": {"b": 1}}
    assert apply_overrides(base, {"a.c": 2, "d.e.f": 3}) == {"a": {"b": 1, "c": 2}, "d": {"e": {"f": 3}}}
    assert base == {"a": {"b": 1}}
