"""From YAML layers and dotted flags to one resolved configuration, and back to YAML.

Later layers win: dataclass defaults < preset < hardware profile < YAML files < dotted flags < overrides of a trial.
"""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import is_dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from motionrft.config.profiles import load_profile
from motionrft.config.schema import RunConfig
from motionrft.core.errors import ConfigError
from motionrft.core.plain import from_plain, to_plain
from motionrft.training.checkpoint import code_version, fingerprint

_STATED_PACKAGES = ("torch", "ray", "deepspeed", "transformers", "peft", "numpy", "pyarrow")


def preset_names() -> list[str]:
    """Return the presets that ship with the project, sorted."""
    folder = resources.files("motionrft.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """Return a preset as plain data, its `extends` resolved.

    Raises:
        ConfigError: unknown name.
    """
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(preset_names())}")
    text = (resources.files("motionrft.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    layer = _parse(text, f"preset {name}")
    parent = layer.pop("extends", None)
    return merge(load_preset(parent), layer) if parent else layer


def resolve(
    preset: str | None = None,
    profile: str | None = None,
    files: Sequence[Path] = (),
    flags: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Return the configuration of all layers.

    Args:
        preset: name of a shipped preset.
        profile: name of a shipped hardware profile, or a YAML path.
        files: YAML files, later ones win.
        flags: "section.field=value" texts; values are YAML.
        overrides: dotted field -> value, e.g. of a search trial.

    Raises:
        ConfigError: unknown preset, profile, file or field, wrong type, or values that contradict each other.
    """
    merged = to_plain(RunConfig())
    layers = [load_preset(preset)] if preset else []
    layers += [{"hardware": to_plain(load_profile(profile))}] if profile else []
    for path in files:
        if not Path(path).is_file():
            raise ConfigError(f"config file {path} does not exist")
        layers.append(_parse(Path(path).read_text(encoding="utf-8"), str(path)))
    for layer in layers:
        _check_sections(layer)
        merged = merge(merged, layer)
    for dotted, value in [*(parse_flag(flag) for flag in flags), *parents_first(overrides or {})]:
        _check_sections([dotted.split(".")[0]])
        set_field(merged, dotted, value)
    return from_plain(RunConfig, merged, "configuration")


def parse_flag(text: str) -> tuple[str, Any]:
    """Return (dotted field, value) of "section.field=value"; leading dashes are allowed.

    Raises:
        ConfigError: no equals sign, or a value that is not YAML.
    """
    name, separator, value = text.lstrip("-").partition("=")
    if not separator or not name:
        raise ConfigError(f"expected section.field=value, got {text!r}. Example: finetune.optim.lr=1e-5")
    try:
        return name, _number(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: the value {value!r} is not YAML ({error})") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, dict):
        return {k: _number(v) for k, v in value.items()}
    return [_number(v) for v in value] if isinstance(value, list) else value


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings merged; `upper` wins.

    Reward weights are one choice and are replaced as a whole, so that a layer never inherits terms it does not name;
    so are the fields of a variant (strategy) when the upper layer chooses another one.
    """
    result = deepcopy(dict(lower))
    for key, value in upper.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and key != "weights":
            other = "class_path" in value and _short(value["class_path"]) != _short(below.get("class_path", ""))
            result[key] = deepcopy(dict(value)) if other else merge(below, value)
        else:
            result[key] = deepcopy(value)
    return result


def _short(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]


def set_field(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one field in nested plain data: "finetune.weights.semantic", "finetune.strategy.window", ...

    Fields of a variant are reached through its name; "finetune.strategy" itself takes the name of another variant, and
    naming the present one keeps its fields (as `merge` does). The "init_args" of the YAML form may be written or left
    out.
    """
    place = values
    *parents, leaf = (key for key in dotted.split(".") if key != "init_args")
    for key in parents:
        below = place.get(key)
        if isinstance(below, str):  # a variant chosen by name alone
            place[key] = {"class_path": below, "init_args": {}}
        elif not isinstance(below, dict):
            place[key] = {}
        place = place[key]
        if "class_path" in place:
            place = place.setdefault("init_args", {})
    present = place.get(leaf)
    if isinstance(value, str) and isinstance(present, dict) and "class_path" in present:
        if _short(present["class_path"]) == _short(value):
            return
    place[leaf] = value


def parents_first(overrides: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (dotted field, value) in an order that sets a variant before the fields it has."""
    return sorted(overrides.items(), key=lambda item: item[0].count("."))


def apply_overrides(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a nested configuration with dotted fields set; missing levels are created."""
    result = deepcopy(dict(base))
    for dotted, value in parents_first(overrides):
        set_field(result, dotted, value)
    return result


def touched_sections(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections that the overrides touch, as objects: `resolve` builds all of them, 20 times as slowly.

    Raises:
        ConfigError: unknown section or field, wrong type, or values that contradict each other.
    """
    names = list(dict.fromkeys(dotted.split(".")[0] for dotted in overrides))
    _check_sections(names)
    values, kinds = apply_overrides(base, overrides), get_type_hints(RunConfig)
    return {n: from_plain(kinds[n], values[n], n) if is_dataclass(kinds[n]) else values[n] for n in names}


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected sections such as {_sections()}, got {type(values).__name__}")
    return {str(k): _number(v) for k, v in values.items()}


def _sections() -> list[str]:
    return list(RunConfig.__dataclass_fields__)


def _check_sections(names: Iterable[str]) -> None:
    for name in names:
        if name not in _sections():
            near = difflib.get_close_matches(name, _sections(), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown section {name!r}; known: {', '.join(_sections())}.{hint}")


def dump(config: RunConfig) -> str:
    """Return the configuration as YAML; `resolve(files=[that])` gives the same configuration."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None, width=100)


def write_run_config(folder: Path, config: RunConfig, command: Sequence[str]) -> None:
    """Write FOLDER/config.yaml, with what else identifies the run as comments.

    Raises:
        ConfigError: the folder cannot be written.
    """
    lines = [
        f"# {' '.join(command)}",
        f"# motionrft {code_version()}, configuration {fingerprint(to_plain(config))[:16]}, {git_state()}",
        "# " + ", ".join(f"{name} {_version(name)}" for name in _STATED_PACKAGES),
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("\n".join(lines) + "\n" + dump(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {folder}: {error}") from error


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def git_state() -> str:
    """Return the checkout's commit, marked when changed; "no git checkout" otherwise."""
    here = Path(__file__).parent
    try:
        commit, state = (
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
            for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.TimeoutExpired):
        return "no git checkout"
    if commit.returncode:
        return "no git checkout"
    return f"commit {commit.stdout.strip()}{' with local changes' if state.stdout.strip() else ''}"
