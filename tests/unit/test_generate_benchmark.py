"""The sampling benchmarks at small sizes: rates, their ratio, and the steps of a released model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from motionrft.evaluation.benchmarks import generate
from motionrft.generators.mdm_network import OFFICIAL
from motionrft.generators.motiondiffuse import MotionDiffuseConfig


def test_rates_follow_from_the_measured_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    small = generate.Released(replace(OFFICIAL, latent_dim=16, layers=1, ff=16), 50, "clip-b32", rounds=1)
    monkeypatch.setattr(generate, "RELEASED", {"small": small})
    monkeypatch.setattr(
        generate, "CLIP_B32", dict.fromkeys(generate.CLIP_B32, 4) | {"num_hidden_layers": 1, "hidden_size": 8}
    )
    found = generate.run(("small",), threads=1, frames=40)["small"]
    rollout = 50 * found["step_ms"] + found["decode_ms"]
    assert found["clips_per_s"] == pytest.approx(2e3 / rollout)
    plain = 50 * (found["unfused_step_ms"] + found["text_ms"]) + found["decode_ms"]
    assert found["over_plain"] == pytest.approx(plain / rollout) and found["steps"] == 50


def test_respacing_saves_steps() -> None:
    small = MotionDiffuseConfig(latent_dim=16, layers=1, heads=2, ff=16, text_width=16, text_ff=16)
    found = generate.respace(small, (2, 40), threads=1, frames=24)
    assert found["faster_at_2"] == pytest.approx(found["seconds_at_40"] / found["seconds_at_2"])
    assert found["faster_at_2"] > 2


def test_released_rows_have_released_sizes() -> None:
    sizes = {name: row.model for name, row in generate.RELEASED.items()}
    assert sizes["hymotion"].width == 1280 and sizes["acmdm-latent-s"].layers == 8 and sizes["mdm-50"].latent_dim == 512
    assert generate.RELEASED["motionlcm-v2"].steps == 4
