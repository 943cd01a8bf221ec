from __future__ import annotations

from pathlib import Path

import pytest

from motionrft.config.hardware import HardwareConfig, RayConfig, WorkersConfig, ZeroConfig
from motionrft.config.profiles import hardware_from_mapping, load_profile, profile_names
from motionrft.core.errors import ConfigError


def test_shipped_profiles_are_the_documented_ones() -> None:
    assert profile_names() == ["cpu2", "gpu1", "gpu8", "nodes4x8"]


@pytest.mark.parametrize("name", ["cpu2", "gpu1", "gpu8", "nodes4x8"])
def test_every_profile_loads(name: str) -> None:
    profile = load_profile(name)
    assert profile.launcher == "ray"
    assert profile.required_gpus == (profile.workers.num_workers if profile.workers.use_gpu else 0)


def test_shared_cluster_profile_uses_a_token_and_shared_storage() -> None:
    profile = load_profile("nodes4x8")
    assert profile.workers.num_workers == 32
    assert profile.ray.auth_mode == "token" and profile.ray.storage_path


def test_profile_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("workers: {threads_per_worker: 3}\n")
    assert load_profile(str(file)).workers.threads_per_worker == 3


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"worker": {}}, "unknown key worker; known: launcher, workers"),
        ({"workers": {"cpus": 1}}, "unknown key cpus"),
        ({"workers": [1]}, "expected a mapping"),
        ({"workers": {"num_workers": "two"}}, "wrong type"),
        ({"launcher": "slurm"}, "launcher"),
        ({"launcher": "local", "zero": {"stage": 1}}, "no ZeRO"),
        ({"launcher": "local", "workers": {"num_workers": 2}}, "use ray"),
    ],
)
def test_wrong_mappings_name_the_key(values: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        hardware_from_mapping(values)


def test_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="cpu2, gpu1, gpu8, nodes4x8"):
        load_profile("gpu4")


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: ZeroConfig(stage=0, precision="bf16"), "autocast"),
        (lambda: ZeroConfig(stage=4), "stage"),
        (lambda: ZeroConfig(stage=0, offload=True), "offload"),
        (lambda: ZeroConfig(precision="fp16"), "precision"),
        (lambda: WorkersConfig(num_workers=0), "num_workers"),
        (lambda: WorkersConfig(use_gpu=True), "use_gpu"),
        (lambda: WorkersConfig(use_gpu=True, gpus_per_worker=2), "one GPU"),
        (lambda: RayConfig(extra_cpus=0), "spare CPU"),
        (lambda: RayConfig(auth_mode=""), "auth_mode"),
        (lambda: HardwareConfig(launcher="ray", ray=RayConfig(connect_timeout_s=0)), "connect_timeout_s"),
    ],
)
def test_contradictions_are_refused(build, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        build()


def test_bf16_is_allowed_where_there_is_a_master_copy() -> None:
    assert all(ZeroConfig(stage=stage, precision="bf16").stage == stage for stage in (1, 2, 3))
