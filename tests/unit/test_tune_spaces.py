"""Every point a search space can draw is a configuration that runs, with the strategy and values it names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from motionrft.config.load import apply_overrides, resolve, set_field, touched_sections
from motionrft.core.errors import ConfigError
from motionrft.core.plain import to_plain
from motionrft.finetune.strategies import STRATEGIES, EasyTune
from motionrft.runtime.tune_search import corner_points, draw
from tune_spaces.space import SearchSpace, load_space, space_names


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return to_plain(resolve("quickstart"))


def value_of(plain: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        plain = plain.get("init_args", plain)[key]
    return plain


def test_every_method_has_a_space_of_its_own() -> None:
    for name in STRATEGIES:
        assert name in space_names(), f"add tune_spaces/{name}.py: the fields of {STRATEGIES[name].__name__}"
        assert load_space(name).fields["finetune.strategy"] == STRATEGIES[name].__name__


@pytest.mark.parametrize("name", space_names())
def test_every_drawn_point_resolves_to_what_it_says(name: str, base: dict) -> None:
    fields = load_space(name).resolved(base)
    rng = np.random.RandomState(0)
    for point in [*corner_points(fields, rng), *(draw(fields, rng) for _ in range(20))]:
        plain = to_plain(touched_sections(base, point))
        strategy = plain["finetune"]["strategy"]["class_path"].rpartition(".")[2]
        assert strategy == point.pop("finetune.strategy", strategy)
        for dotted, value in point.items():
            assert value_of(plain, dotted) == value, dotted


@pytest.mark.parametrize("field", ["finetune.strategy.windoww", "finetune.weights.beauty", "finetune.optim.rate"])
def test_a_field_that_does_not_exist_is_found_before_any_trial(field: str, base: dict) -> None:
    space = SearchSpace("?", {"finetune.strategy": "EasyTune", field: {"choice": [1.0]}})
    with pytest.raises(ConfigError, match=field.rpartition(".")[2]):
        for point in corner_points(space.resolved(base), np.random.RandomState(0)):
            touched_sections(base, point)


def test_touched_sections_are_those_of_the_whole_configuration() -> None:
    point = {"finetune.strategy": "ReFL", "seed": 3, "inputs.dataset": "d"}
    whole = resolve("quickstart", overrides=point)
    found = touched_sections(to_plain(resolve("quickstart")), point)
    assert found == {"finetune": whole.finetune, "seed": 3, "inputs": whole.inputs}
    with pytest.raises(ConfigError, match="Did you mean 'finetune'"):
        touched_sections(to_plain(whole), {"finetunee.batches": 3})


def test_corner_points_reach_every_choice_and_both_ends() -> None:
    space = {"a": {"choice": [1, 2, 3]}, "b": {"loguniform": [0.1, 10.0]}, "c": 5, "d": {"randint": [0, 4]}}
    points = list(corner_points(space, np.random.RandomState(0)))
    assert {p["a"] for p in points} == {1, 2, 3} and {0.1, 10.0} <= {p["b"] for p in points}
    assert {p["c"] for p in points} == {5} and {0, 3} <= {p["d"] for p in points} <= {0, 1, 2, 3}


def test_drawn_points_are_seeded_and_spread() -> None:
    space = {"x": {"loguniform": [1e-4, 1e-2]}, "k": {"grid": ["a", "b"]}}
    first, again = ([draw(space, rng) for _ in range(200)] for rng in (np.random.RandomState(s) for s in (5, 5)))
    assert first == again
    x = np.log10([p["x"] for p in first])
    assert x.min() >= -4 and x.max() <= -2 and abs(x.mean() + 3) < 0.2
    assert {p["k"] for p in first} == {"a", "b"}


def test_around_scales_with_the_configuration_and_the_users_own_field_wins(base: dict) -> None:
    space = load_space("refl")
    assert space.resolved(base)["finetune.optim.lr"] == {"loguniform": pytest.approx([2.4e-5, 2.4e-4])}
    paper = space.resolved(to_plain(resolve("paper")))
    assert paper["finetune.optim.lr"] == {"loguniform": pytest.approx([3e-6, 3e-5])}
    own = space.resolved(base, {"finetune.optim.lr": 1e-5, "finetune.batch_size": {"around": [0.5, 2]}})
    assert own["finetune.optim.lr"] == 1e-5 and own["finetune.batch_size"] == {"loguniform": [16, 64]}
    with pytest.raises(ConfigError, match=r"finetune.nothing: around needs a positive number"):
        space.resolved(base, {"finetune.nothing": {"around": [0.5, 2]}})


def test_naming_the_present_strategy_keeps_its_fields_and_order_does_not_matter(base: dict) -> None:
    base = apply_overrides(base, {"finetune.strategy.score": "x_prev"})
    point = {"finetune.strategy.window": 2, "finetune.strategy": "EasyTune"}  # the field before its strategy
    kept = touched_sections(base, point)["finetune"].strategy
    assert isinstance(kept, EasyTune) and (kept.score, kept.window) == ("x_prev", 2)
    other = {"finetune.strategy.last_steps": 2, "finetune.strategy": "DRaFT"}
    assert resolve("quickstart", overrides=other).finetune.strategy == STRATEGIES["draft"](last_steps=2)
    values = {"s": {"class_path": "m.A", "init_args": {"x": 1}}}
    set_field(values, "s", "m.B")
    assert values == {"s": "m.B"}
