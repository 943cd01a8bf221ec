"""Named hardware profiles: `cluster/profiles/*.yaml`, each a plain YAML of `HardwareConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from motionrft.config.hardware import HardwareConfig, RayConfig, WorkersConfig, ZeroConfig
from motionrft.core.errors import ConfigError

_SECTIONS = {"workers": WorkersConfig, "zero": ZeroConfig, "ray": RayConfig}
Section = TypeVar("Section")


def profile_names() -> list[str]:
    """Return the names of the profiles that ship with the project, sorted."""
    folder = resources.files("cluster") / "profiles"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_profile(name: str) -> HardwareConfig:
    """Return a shipped profile by name (`cpu2`), or one of the user's by path (`my/cluster.yaml`).

    Raises:
        ConfigError: unknown name, unreadable YAML, unknown key or values that contradict each other.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"hardware profile file {path} does not exist")
        return hardware_from_mapping(_parse(path.read_text(encoding="utf-8"), str(path)), str(path))
    if name not in profile_names():
        raise ConfigError(
            f"unknown hardware profile {name!r}; known: {', '.join(profile_names())}. "
            "A profile of your own is given by its path, ending in .yaml"
        )
    text = (resources.files("cluster") / "profiles" / f"{name}.yaml").read_text(encoding="utf-8")
    return hardware_from_mapping(_parse(text, f"profile {name}"), f"profile {name}")


def hardware_from_mapping(values: Mapping[str, Any], where: str = "hardware") -> HardwareConfig:
    """Return the config of a nested mapping.

    Raises:
        ConfigError: unknown key, wrong type, or values that contradict each other.
    """
    rest = dict(values)
    parts: dict[str, Any] = {
        key: _build(section, rest.pop(key), f"{where}: {key}") for key, section in _SECTIONS.items() if key in rest
    }
    return _build(HardwareConfig, {**rest, **parts}, where)


def _parse(text: str, where: str) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error
    return values if values is not None else {}


def _build(section: type[Section], values: Any, where: str) -> Section:
    known = {f.name: f for f in fields(section)}  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping with keys from {', '.join(known)}; got {values!r}")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    try:
        return section(**values)
    except TypeError as error:  # e.g. a text where a number is compared
        raise ConfigError(f"{where}: wrong type ({error})") from error
