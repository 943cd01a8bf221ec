from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from motionrft.core.errors import CheckpointError
from motionrft.training import checkpoint as module
from motionrft.training.checkpoint import (
    Card,
    CheckpointStore,
    Snapshot,
    complete_checkpoints,
    latest,
    load_checkpoint,
    save_checkpoint,
)

CARD = Card("reward", {"a": 1}, {"normaliser": "abc"})


def snapshot(batches: int) -> Snapshot:
    return Snapshot(batches, batches, {"w": torch.full((64,), float(batches))}, {"exp_avg/w": torch.zeros(64)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, snapshot(1), CARD)


def test_missing_folder_lists_what_there_is(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got nothing .*step_00000099.*Checkpoints here: step_00000001"):
        load_checkpoint(saved.parent / "step_00000099")


def test_empty_folder_is_not_random_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_truncated_file_is_named(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match=rf"truncated or replaced .*{name}"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_one_flipped_bit_is_noticed(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[-1] ^= 1
    (saved / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"changed since written .*{name}"):
        load_checkpoint(saved)


def test_missing_file_is_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors; got nothing"):
        load_checkpoint(saved)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1}', "[]", '{"schema": 2}'])
def test_damaged_or_future_manifest_is_a_clear_error(saved: Path, text: str) -> None:
    (saved / "MANIFEST.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        load_checkpoint(saved)


def test_another_models_checkpoint_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"kind 'generator/mdm'; got kind 'reward'"):
        load_checkpoint(saved, expected_kind="generator/mdm")


def test_another_normaliser_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="normaliser: expected xyz, got abc"):
        load_checkpoint(saved, expected_fingerprints={"normaliser": "xyz"})


def test_another_runs_folder_is_not_overwritten(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="another run"):
        save_checkpoint(saved.parent, snapshot(1), Card("reward", {"a": 2}))
    assert float(load_checkpoint(saved).snapshot.model["w"][0]) == 1.0


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl"])
def test_pickles_are_refused_unopened_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    trap = tmp_path / "exploded"
    monkeypatch.setenv("BOMB", str(trap))
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(_Bomb()))
    for target in (file, tmp_path):
        with pytest.raises(CheckpointError, match="motionrft import"):
            load_checkpoint(target)
    assert not trap.exists()


def test_pickle_disguised_as_safetensors_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = saved.parent / "exploded"
    monkeypatch.setenv("BOMB", str(trap))
    (saved / "model.safetensors").write_bytes(pickle.dumps(_Bomb()))
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    manifest["files"]["model.safetensors"] = module._describe(saved / "model.safetensors")
    (saved / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="safetensors file"):
        load_checkpoint(saved)
    assert not trap.exists()


def test_manifest_cannot_point_outside_its_folder(saved: Path) -> None:
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    manifest["files"]["../../etc/passwd.json"] = {"bytes": 1, "sha256": ""}
    (saved / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="plain"):
        load_checkpoint(saved)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_full_disk_at_any_write_keeps_the_previous_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    count = 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"disk is full.*Earlier checkpoints are intact"):
        CheckpointStore(saved.parent, CARD).save(snapshot(2))
    assert [p.name for p in saved.parent.iterdir()] == ["step_00000001"]
    assert float(load_checkpoint(saved.parent).snapshot.model["w"][0]) == 1.0


def test_full_disk_reported_by_the_tensor_library_is_recognised(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.save_file
    monkeypatch.setattr(module, "save_file", lambda tensors, path: real(tensors, "/dev/full"))
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(saved.parent, snapshot(2), CARD)
    assert latest(saved.parent) == saved


_WRITER = """
import sys, time
from pathlib import Path
import torch
from motionrft.training import checkpoint as c
root, stage = Path(sys.argv[1]), sys.argv[2]
card = c.Card("reward", {"a": 1}, {"normaliser": "abc"})
store = c.CheckpointStore(root, card)
store.save(c.Snapshot(1, 1, {"w": torch.ones(64)}, {}))
def hang(*a, **k):
    print("ready", flush=True)
    time.sleep(60)
if stage == "json":
    c._write_json = hang
elif stage == "rename":
    c.os.replace = hang
else:
    real = c._write_tensors
    def write(path, tensors):
        real(path, tensors)
        path.write_bytes(path.read_bytes()[:40])
        hang()
    c._write_tensors = write
store.save(c.Snapshot(2, 2, {"w": torch.full((64,), 2.0)}, {}))
"""


@pytest.mark.parametrize("stage", ["tensors", "json", "rename"])
def test_process_killed_while_writing_leaves_the_previous_checkpoint_as_latest(tmp_path: Path, stage: str) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path), stage],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline().strip() == "ready"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert latest(tmp_path).name == "step_00000001"
    assert float(load_checkpoint(tmp_path).snapshot.model["w"][0]) == 1.0
    # The next run writes the same step and clears what the dead writer left.
    time.sleep(0.01)
    store = CheckpointStore(tmp_path, Card("reward", {"a": 1}, {"normaliser": "abc"}))
    store.save(Snapshot(2, 2, {"w": torch.full((64,), 2.0)}, {}))
    assert [p.name for p in complete_checkpoints(tmp_path)] == sorted(p.name for p in tmp_path.iterdir())
