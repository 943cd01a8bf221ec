"""One optimiser step is the same step on every engine, ZeRO stage, number of processes, and across a change of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from motionrft.config.hardware import ZeroConfig
from motionrft.runtime import deepspeed_engine
from motionrft.training.optim import OptimConfig
from tests import engine_worker
from tests.processes import launch

OPTIM = {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 2, "total_steps": 12, "grad_clip": 0.5}
ENGINES = ("single", "zero0", "zero1", "zero2", "zero3")
SHARED = ENGINES[1:]
TOLERANCE = 2e-6  # other summation orders
SPLIT, END, POISON = 3, 7, 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W1 and W2 runs of every engine: straight with a poisoned batch, first half, and second halves of one another."""
    folder = tmp_path_factory.mktemp("engines")

    def job(kind: str, first: int, last: int, name: str, **rest) -> dict:
        return {"kind": kind, "optim": OPTIM, "first": first, "last": last, "out": str(folder / name), **rest}

    def pair(kind: str, world: int) -> list[dict]:
        tag = f"{kind}_w{world}"
        return [
            job(kind, 0, END, f"straight_{tag}", poison_step=POISON),
            job(kind, 0, END, f"clean_{tag}"),
            job(kind, 0, SPLIT, f"half_{tag}"),
        ]

    def resumed(kind: str, world: int, source: str) -> dict:
        load = str(folder / f"half_{source}.safetensors")
        return job(kind, SPLIT, END, f"resumed_{source}_to_{kind}_w{world}", load=load)

    precise = [
        job(kind, 0, END, f"{precision}_{kind}_w1", precision=precision)
        for precision, kinds in (("autocast", ["single", "zero0", "zero1", "zero2"]), ("bf16", ["zero1", "zero2"]))
        for kind in kinds
    ]
    precise.append(job("zero1", 0, 1, "small_zero1_w1", precision="bf16", optim={"lr": 1e-5, "schedule": "constant"}))
    launch("tests.engine_worker", [j for kind in ENGINES for j in pair(kind, 1)] + precise, 1, folder)
    from_single = [resumed(kind, 2, "single_w1") for kind in SHARED]
    from_single += [resumed("zero1", 2, "zero3_w1"), resumed("zero3", 2, "zero2_w1")]
    launch("tests.engine_worker", [j for kind in SHARED for j in pair(kind, 2)] + from_single, 2, folder)
    launch(
        "tests.engine_worker",
        [resumed("single", 1, f"{kind}_w2") for kind in SHARED]
        + [resumed(kind, 1, "zero2_w2") for kind in SHARED]
        + [resumed("zero2", 1, "zero3_w2"), resumed("zero0", 1, "single_w1")],
        1,
        folder,
    )
    return folder


def outcome(folder: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def assert_same(folder: Path, name: str, reference: str, rows_from: int = 0) -> None:
    got, got_state = outcome(folder, name)
    want, want_state = outcome(folder, reference)
    assert got["steps"] == want["steps"]
    rows, want_rows = torch.tensor(got["rows"]), torch.tensor(want["rows"][rows_from:])
    assert torch.allclose(rows, want_rows, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True), f"{rows}\n{want_rows}"
    assert set(got_state) == set(want_state)
    worst = {key: float((got_state[key] - want_state[key]).abs().max()) for key in want_state}
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("kind", SHARED)
def test_deepspeed_in_one_process_equals_plain_torch(runs: Path, kind: str) -> None:
    assert_same(runs, f"clean_{kind}_w1", "clean_single_w1")


@pytest.mark.parametrize("kind", SHARED)
def test_two_processes_equal_one_on_the_global_batch_with_coupled_loss(runs: Path, kind: str) -> None:
    assert_same(runs, f"clean_{kind}_w2", "clean_single_w1")


@pytest.mark.parametrize(("kind", "world"), [(k, 1) for k in SHARED] + [(k, 2) for k in SHARED])
def test_bad_loss_or_gradient_on_rank_zero_refuses_the_step_everywhere_and_the_next_is_clean(
    runs: Path, kind: str, world: int
) -> None:
    assert_same(runs, f"straight_{kind}_w{world}", "straight_single_w1")
    result, _ = outcome(runs, f"straight_{kind}_w{world}")
    assert result["skipped"] == 2
    assert [row[2] for row in result["rows"]] == [float(step not in (POISON, POISON + 1)) for step in range(END)]


@pytest.mark.parametrize("world", [1, 2])
def test_refused_step_leaves_weights_and_moments_untouched(runs: Path, world: int) -> None:
    names = ["straight_single_w1"] if world == 1 else [f"straight_{kind}_w2" for kind in SHARED]
    for name in names:
        result, state = outcome(runs, name)
        assert result["steps"] == END - 2
        assert all(torch.isfinite(tensor).all() for tensor in state.values())


@pytest.mark.parametrize("kind", SHARED)
def test_single_process_run_continues_on_two_processes(runs: Path, kind: str) -> None:
    assert_same(runs, f"resumed_single_w1_to_{kind}_w2", "clean_single_w1", SPLIT)


@pytest.mark.parametrize("kind", SHARED)
def test_two_process_run_continues_in_plain_torch(runs: Path, kind: str) -> None:
    assert_same(runs, f"resumed_{kind}_w2_to_single_w1", "clean_single_w1", SPLIT)


@pytest.mark.parametrize(
    "name",
    [f"zero2_w2_to_{kind}_w1" for kind in SHARED]
    + ["zero3_w1_to_zero1_w2", "zero2_w1_to_zero3_w2", "zero3_w2_to_zero2_w1", "single_w1_to_zero0_w1"],
)
def test_run_continues_at_another_zero_stage_and_world_size(runs: Path, name: str) -> None:
    assert_same(runs, f"resumed_{name}", "clean_single_w1", SPLIT)


@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2"])
def test_autocast_is_the_same_on_every_engine_and_close_to_fp32(runs: Path, kind: str) -> None:
    got, _ = outcome(runs, f"autocast_{kind}_w1")
    plain, _ = outcome(runs, "autocast_single_w1")
    exact, _ = outcome(runs, "clean_single_w1")
    assert torch.allclose(torch.tensor(got["rows"]), torch.tensor(plain["rows"]), rtol=2e-2, atol=2e-2)
    assert torch.allclose(torch.tensor(got["rows"]), torch.tensor(exact["rows"]), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["zero1", "zero2"])
def test_bf16_weights_keep_an_fp32_master(runs: Path, kind: str) -> None:
    _, state = outcome(runs, f"bf16_{kind}_w1")
    weights = torch.cat([t.flatten() for key, t in state.items() if key.startswith("param/")])
    assert not torch.equal(weights, weights.bfloat16().float())  # exported from the master, not from bf16 weights
    exact, _ = outcome(runs, "clean_single_w1")
    got, _ = outcome(runs, f"bf16_{kind}_w1")
    assert abs(got["rows"][0][0] - exact["rows"][0][0]) < 0.1


def test_updates_too_small_for_bf16_reach_the_master(runs: Path) -> None:
    _, state = outcome(runs, "small_zero1_w1")
    # The engine's weights start as bf16 numbers, and so does their master.
    start = {name: p.detach().bfloat16().float() for name, p in engine_worker.TinyNet().named_parameters()}
    moved = state["param/encode.weight"] - start["encode.weight"]
    assert 0.5e-5 < moved.abs().max() < 2e-5
    rounded = state["param/encode.weight"].bfloat16().float()
    assert (rounded == start["encode.weight"]).float().mean() > 0.8


def test_gradient_is_not_the_average_of_uncoupled_halves() -> None:
    # The invariants above would pass with any loss that splits over ranks: this one must not split.
    torch.manual_seed(0)
    z, target = torch.randn(4, 3), torch.randn(4, 3)
    whole = engine_worker.info_nce(z, target)
    halves = (engine_worker.info_nce(z[:2], target[:2]) + engine_worker.info_nce(z[2:], target[2:])) / 2
    assert abs(float(whole - halves)) > 0.1


def test_config_never_asks_deepspeed_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    config = deepspeed_engine.deepspeed_config(OptimConfig(total_steps=1), ZeroConfig(stage=2), world=2)
    assert config["optimizer"]["params"]["torch_adam"] is True
    if not torch.cuda.is_available():
        import deepspeed.ops

        monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
        deepspeed_engine.disable_compiled_extension()
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
