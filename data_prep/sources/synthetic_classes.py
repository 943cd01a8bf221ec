"""The classes: an action family and its attributes. The tuple is the class, never the wording of a caption."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from motionrft.core.rng import stable_key


@dataclass(frozen=True)
class ActionClass:
    """One class, e.g. walk with direction=forward and speed=slow."""

    family: str
    attributes: tuple[tuple[str, str], ...]  # (attribute, value), in the order of the name

    @property
    def name(self) -> str:
        """Attribute tuple as text: "walk|forward|slow"."""
        return "|".join((self.family, *(value for _, value in self.attributes)))

    def get(self, attribute: str, default: str = "") -> str:
        """Return the value of an attribute."""
        return dict(self.attributes).get(attribute, default)

    @property
    def mirrored(self) -> bool:
        """True for every "right" class: it is the mirror image of its "left" twin."""
        return any(value == "right" for _, value in self.attributes)

    @property
    def authored(self) -> ActionClass:
        """The left twin of a "right" class, else the class itself: motion is written for the left side only."""
        return ActionClass(self.family, tuple((a, "left" if v == "right" else v) for a, v in self.attributes))


_SIDES, _SPEEDS = ("left", "right"), ("slow", "fast")
_STYLES = ("tired", "proud", "drunk", "arms_spread", "hands_on_hips", "arms_up")

_TABLE: tuple[tuple[str, dict[str, tuple[str, ...]]], ...] = (
    ("walk", {"direction": ("forward",), "speed": ("slow", "normal", "fast")}),
    ("walk", {"direction": ("backward",), "speed": _SPEEDS}),
    ("circle", {"direction": _SIDES}),
    ("tiptoe", {}),
    ("limp", {"side": _SIDES}),
    ("run", {"direction": ("forward",), "speed": _SPEEDS}),
    ("jump", {"direction": ("up",), "count": ("1", "2", "3")}),
    ("jump", {"direction": ("forward",), "count": ("1", "2")}),
    ("jump", {"direction": ("backward",), "count": ("1",)}),
    ("jump", {"direction": _SIDES, "count": ("1",)}),
    ("hop", {"side": _SIDES, "direction": ("in_place", "forward")}),
    ("turn", {"direction": _SIDES, "angle": ("quarter", "half", "full")}),
    ("sit", {"speed": _SPEEDS}),
    ("stand", {"speed": _SPEEDS}),
    ("squat", {"count": ("1", "2", "3")}),
    ("wave", {"side": _SIDES, "speed": _SPEEDS}),
    ("raise", {"side": (*_SIDES, "both"), "direction": ("front", "side")}),
    ("kick", {"side": _SIDES, "direction": ("forward", "sideways")}),
    ("punch", {"side": _SIDES, "count": ("1", "2", "3")}),
    ("bow", {"depth": ("slight", "deep")}),
    ("sidestep", {"direction": _SIDES, "speed": _SPEEDS}),
    ("throw", {"side": _SIDES, "manner": ("overhand", "underhand")}),
    ("sway", {"speed": _SPEEDS}),
    ("crouch", {"direction": ("forward", "backward")}),
    ("clap", {"place": ("chest", "overhead"), "speed": _SPEEDS}),
    ("march", {"speed": _SPEEDS}),
    ("stretch", {"direction": (*_SIDES, "up")}),
    ("lunge", {"side": _SIDES}),
    ("jack", {"speed": _SPEEDS}),
    ("walk", {"style": _STYLES}),
    ("run", {"style": _STYLES}),
    ("march", {"style": _STYLES}),
    ("sidestep", {"direction": _SIDES, "style": ("tired", "arms_spread", "arms_up")}),
    ("circle", {"direction": _SIDES, "style": ("tired", "arms_spread", "arms_up")}),
)


def all_classes(families: tuple[str, ...] = ()) -> tuple[ActionClass, ...]:
    """Return the classes of some families (none named: all), in a fixed shuffled order so that few clips show many."""
    found = [
        ActionClass(family, tuple(zip(attributes, values)))
        for family, attributes in _TABLE
        for values in product(*attributes.values())
        if not families or family in families
    ]
    return tuple(sorted(found, key=lambda c: stable_key(f"synthetic class {c.name}")))


FAMILIES = tuple(dict.fromkeys(family for family, _ in _TABLE))
