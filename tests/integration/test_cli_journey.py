"""The command line as a user meets it: the whole way at smoke size, a search, and what wrong input says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from motionrft.cli.main import main
from tests.check_summary import problems

ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a quickstart folder made by one process; an existing smoke run may stand in for it."""
    folder = tmp_path_factory.mktemp("journey") / "run"
    assert main(["quickstart", "--preset", "smoke", "--backend", "single", "--run-dir", str(folder)]) == 0
    return folder


def inputs(run: Path) -> list[str]:
    return [
        f"inputs.dataset={run / 'data'}",
        f"inputs.generator={run / 'pretrain' / 'model'}",
        f"inputs.reward.backbone={run / 'reward' / 'model'}",
        f"inputs.reward.preference={run / 'preference' / 'model'}",
        f"inputs.reward.authenticity={run / 'authenticity' / 'model'}",
        f"inputs.evaluators.A={run / 'evaluator_A' / 'model'}",
    ]


@pytest.mark.slow
def test_the_whole_way_in_one_process_leaves_everything_its_contract_names(finished: Path) -> None:
    assert problems(finished) == []
    assert "<html" in (finished / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_finetune_and_evaluate_run_alone_on_what_quickstart_left(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--preset", "smoke", "--backend", "single", "--run-dir", str(tmp_path / "ft")]
    assert main([*command, *inputs(finished), "finetune.strategy=DRaFT", "finetune.strategy.last_steps=2"]) == 0
    assert "DRaFT" in (tmp_path / "ft" / "plan.txt").read_text()
    assert main([*command, *inputs(finished)]) == 2 and "--resume" in capsys.readouterr().err
    again = ["evaluate", "--preset", "smoke", "--backend", "single", "--json", "--run-dir", str(tmp_path / "ev")]
    changed = [f if not f.startswith("inputs.generator") else f"inputs.generator={tmp_path / 'ft' / 'model'}"
               for f in inputs(finished)]  # fmt: skip
    reference = f"inputs.reference={finished / 'pretrain' / 'model'}"
    capsys.readouterr()
    assert main([*again, *changed, reference, "evaluate.seeds=1"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["evaluators"]["A"]) == {"real", "before", "after"}


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_executes_what_it_samples_and_its_best_trial_can_be_repeated(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "search"
    command = ["tune", "--preset", "smoke", "--profile", "cpu2", "--samples", "4", "--concurrent", "2"]
    assert main([*command, "--run-dir", str(run), *inputs(finished)]) == 0
    rows = json.loads((run / "results.json").read_text())
    assert len(rows) == 4 and (run / "results.csv").is_file() and (run / "report.html").is_file()
    plans = set()
    for place in (run / "runs").iterdir():
        config = yaml.safe_load((place / "config.yaml").read_text())["finetune"]
        text = (place / "plan.txt").read_text()
        assert f"'window': {config['strategy']['init_args']['window']}" in text
        assert str(config["weights"]["smoothness"]) in text
        plans.add(text)
    assert len(plans) == 4
    best = next(r for r in rows if r["value"] is not None)
    alone = tmp_path / "alone"
    flags = ["--config", str(run / "best_config.yaml"), "--backend", "single", "--run-dir", str(alone)]
    assert main(["finetune", *flags]) == 0
    found = json.loads((alone / "summary.json").read_text())["validation"]["val/score"]
    assert found == pytest.approx(best["value"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune"], "inputs.dataset is not set"),
        (["finetune", "inputs.dataset=/nowhere"], "does not exist"),
        (["finetune", "finetune.weights.semantic=-1"], "must not be negative"),
        (["finetune", "--preset", "quickstart", "finetune.strategy.window=11"], "more than the 10 denoising steps"),
        (["pretrain", "pretrain.trian.steps=3"], "trian"),
        (["quickstart", "--profile", "cpu3"], "unknown hardware profile"),
        (["quickstart", "--data", "bvh"], "needs --path"),
        (["evaluate", "--config", "absent.yaml"], "does not exist"),
        (["report", "/nowhere"], "not a run folder"),
        (["generate"], "no caption"),
    ],
)
def test_wrong_input_is_one_block_and_exit_code_two(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


def test_an_address_nobody_answers_at_is_refused_in_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["hardware.ray.address=127.0.0.1:1", "hardware.ray.connect_timeout_s=2"]
    assert main(["quickstart", "--preset", "smoke", "--run-dir", str(tmp_path / "q"), *fields]) == 2
    assert "no Ray cluster answered" in capsys.readouterr().err


def test_a_pickle_or_a_foreign_checkpoint_is_not_opened(tmp_path: Path) -> None:
    from motionrft.core.errors import CheckpointError
    from motionrft.training.recipes.generator_files import load_generator

    (tmp_path / "model.pt").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError):
        load_generator(tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
        load_generator(tmp_path)


def test_a_full_disk_is_named_and_other_faults_are_not_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n')

    def fail(number: int) -> None:
        def write(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("motionrft.cli.report.write_report", write)

    fail(errno.ENOSPC)
    assert main(["report", str(tmp_path)]) == 2
    assert "the disk is full" in capsys.readouterr().err
    fail(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        main(["report", str(tmp_path)])


def test_curves_go_to_tensorboard_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = tmp_path / "run" / "pretrain"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss/total": 1.0}\n')
    command = ["report", str(tmp_path / "run"), "--tensorboard", str(tmp_path / "logs")]
    assert main(command) == 0
    events = next((tmp_path / "logs" / "pretrain").glob("events.*")).read_bytes()
    assert events.count(b"loss/total") == 2
    assert main(command) == 2 and "twice" in capsys.readouterr().err


def test_show_plan_draws_strips_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--preset", "quickstart", "--show-plan", "finetune.strategy.window=3"]) == 0
    assert "network [###       ]" in capsys.readouterr().out


@pytest.mark.slow
def test_the_wheel_carries_profiles_presets_and_the_doctor(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".venv", "runs", ".git", "*.egg-info", "build", "__pycache__")
    shutil.copytree(root, source, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    target = tmp_path / "site"
    wheel = next(tmp_path.glob("motionrft-*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    code = (
        "import motionrft, sys; from motionrft.cli.main import main; from motionrft.config.load import resolve;"
        "assert motionrft.__file__.startswith(sys.argv[1]), motionrft.__file__;"
        "resolve('quickstart', 'gpu8'); sys.exit(main(['doctor']))"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**ENVIRONMENT, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "gpu8" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["== prepare", "step "], ids=["while preparing", "in a training stage"])
def test_ctrl_c_on_ray_says_so_and_the_same_command_with_resume_goes_on(tmp_path: Path, moment: str) -> None:
    command = [sys.executable, "-m", "motionrft.cli.main", "quickstart", "--preset", "smoke", "--run-dir", "run"]
    log = tmp_path / "log.txt"

    def run_until(moment: str, *options: str) -> tuple[int, str]:
        with log.open("w") as handle:
            process = subprocess.Popen(
                [*command, *options], cwd=tmp_path, env=ENVIRONMENT, stdout=handle, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 900  # only so that a hang ends; a loaded machine takes minutes
        while moment not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        return process.wait(300), log.read_text()

    code, said = run_until(moment)
    assert (code, "stopped: " in said, "Traceback" in said) == (130, True, False), said[-2000:]
    code, said = run_until("== pairs", "--resume")
    assert code == 130 and "== pairs" in said, said[-2000:]
