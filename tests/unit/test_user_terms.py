"""The README's own reward term, as a user would write it, and how its module reaches every process of a run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from motionrft.config.load import resolve
from motionrft.core.errors import ConfigError
from motionrft.core.plain import from_plain, to_plain
from motionrft.core.types import Representation
from motionrft.reward import terms as terms_module
from motionrft.reward.motion_reward import MotionReward
from motionrft.training.recipes import evaluate
from motionrft.training.recipes.evaluate import EvaluateRecipe, RewardFolders, ScoreJob
from motionrft.training.recipes.finetune import FinetuneJob
from tests.reward_fixtures import NORMALIZERS, make_adapted, make_backbone, make_batch

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.search(r"## Your own reward term\n(.*?)\n## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
EXAMPLE = re.search(r"```python\n(.*?)```", SECTION, re.S)[1]
FLAGS = re.findall(r"'?(finetune\.[\w.]+=[^\s']+)'?", SECTION)


@pytest.fixture
def my_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the README's text into my_terms.py on the path of this process, and forget it afterwards."""
    (tmp_path / "my_terms.py").write_text(EXAMPLE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(terms_module.TERMS)
    yield tmp_path
    sys.modules.pop("my_terms", None)
    terms_module.TERMS.clear()
    terms_module.TERMS.update(before)


def in_new_process(code: str, path: Path | None) -> subprocess.CompletedProcess[str]:
    places = [str(ROOT), *([str(path)] if path else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def test_the_example_is_short_and_its_flags_make_a_run(my_terms: Path) -> None:
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 10
    assert len(FLAGS) == 2
    recipe = resolve("paper", flags=FLAGS).finetune
    assert recipe.term_modules == ("my_terms",)
    assert recipe.weights["raised_hands"] == 0.05 and recipe.weights["semantic"] == 1.0


@pytest.mark.parametrize("kind", list(Representation))
def test_the_example_scores_what_it_says_and_has_a_gradient(my_terms: Path, kind: Representation) -> None:
    resolve("paper", flags=FLAGS)
    backbone = make_backbone()
    reward, batch = MotionReward(backbone, NORMALIZERS, make_adapted(backbone)), make_batch()
    motion = batch.motions[kind].clone().requires_grad_()
    text = reward.encode_text(batch.text)
    found = reward.score(motion, batch.lengths_B, kind, text_BE=text, terms=["semantic", "raised_hands"])
    joints = terms_module.to_joints(batch.motions[kind], kind)
    gap = joints[..., 20:, 1].mean(-1) - joints[..., 15, 1]
    want = torch.stack([row[:n].mean() for row, n in zip(gap, batch.lengths_B.tolist(), strict=True)])
    assert torch.allclose(found.values["raised_hands"], want, atol=1e-5)
    found.total({"semantic": 1.0, "raised_hands": 0.05}).sum().backward()
    assert motion.grad[batch.mask_BT].abs().sum() > 0 and (motion.grad[~batch.mask_BT] == 0).all()


def test_a_worker_that_gets_the_plain_job_knows_the_term(my_terms: Path) -> None:
    job = FinetuneJob("data", "generator", RewardFolders("backbone"), recipe=resolve("paper", flags=FLAGS).finetune)
    code = (
        "from motionrft.core.plain import from_plain\n"
        "from motionrft.training.recipes.finetune import FinetuneJob\n"
        f"job = from_plain(FinetuneJob, {to_plain(job)!r})\n"
        "from motionrft.reward.terms import TERMS\n"
        "print(job.recipe.weights['raised_hands'], TERMS['raised_hands'].__module__)\n"
    )
    done = in_new_process(code, my_terms)
    assert done.stdout.split() == ["0.05", "my_terms"], done.stderr


def test_a_scoring_shard_that_parsed_no_configuration_imports_the_modules_itself(
    my_terms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = EvaluateRecipe()
    job = ScoreJob("", "", 0, "", "", "", {}, RewardFolders("b"), {"raised_hands": 1.0}, recipe, ("my_terms",))
    nothing = SimpleNamespace(terms_for=lambda representation: ())
    monkeypatch.setattr(evaluate, "_reward", lambda *folders: nothing)
    assert "raised_hands" not in terms_module.TERMS
    assert evaluate._reward_terms(job, Representation.JOINT) == ()
    assert "raised_hands" in terms_module.TERMS


def test_a_missing_module_is_named_with_its_field_and_the_cure() -> None:
    with pytest.raises(ConfigError, match=r"'no_such_terms'.*finetune\.term_modules.*PYTHONPATH"):
        resolve("paper", flags=["finetune.term_modules=[no_such_terms]"])
    with pytest.raises(ConfigError, match=r"unknown terms \['raised_hands'\]"):
        resolve("paper", flags=["finetune.weights.raised_hands=1"])


def test_a_worker_without_the_module_says_so(my_terms: Path) -> None:
    job = to_plain(FinetuneJob("data", "gen", RewardFolders("b"), recipe=resolve("paper", flags=FLAGS).finetune))
    assert from_plain(FinetuneJob, job).recipe.term_modules == ("my_terms",)
    code = (
        "from motionrft.core.plain import from_plain\n"
        "from motionrft.training.recipes.finetune import FinetuneJob\n"
        f"from_plain(FinetuneJob, {job!r})\n"
    )
    done = in_new_process(code, None)
    assert done.returncode != 0
    assert "ConfigError" in done.stderr and "No module named 'my_terms'" in done.stderr
