"""Configuration dataclasses from plain data and back: what crosses process borders is plain, what runs is typed.

A worker receives a mapping and rebuilds the object here; it never parses a command line. Fields whose type is a base
class (a fine-tuning strategy) hold {"class_path": NAME, "init_args": {...}}.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from motionrft.core.errors import ConfigError, MotionRFTError

Config = TypeVar("Config")

_VARIANT_BASES: list[type | str] = []


def variant_base(base: type[Config]) -> type[Config]:
    """Mark a dataclass whose subclasses are alternatives a configuration may choose by name."""
    _VARIANT_BASES.append(base)
    prepare_parsing.cache_clear()
    return base


@lru_cache(maxsize=1)
def prepare_parsing() -> None:
    """Set the parser up: field docs become help, marked bases accept their subclasses."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True, subclasses_enabled=list(_VARIANT_BASES))


def to_plain(value: Any) -> Any:
    """Return JSON data for a configuration: mappings, lists, numbers, text."""
    if is_dataclass(value) and not isinstance(value, type):
        data = {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.init}
        kind = type(value)
        if any(base in _VARIANT_BASES for base in kind.__mro__):
            return {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": data}
        return data
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type[Config], data: Mapping[str, Any], where: str = "") -> Config:
    """Return a `kind` built from plain data; absent fields take their defaults.

    Raises:
        ConfigError: unknown field, wrong type, or values that contradict each other; names the field.
    """
    place = f"{where or kind.__name__}: "
    prepare_parsing()
    try:
        parser = _parser(kind)  # type: ignore[arg-type]
        namespace = parser.parse_object({"config": _completed(kind, data)})
        return parser.instantiate(namespace).config  # type: ignore[no-any-return]
    except MotionRFTError as error:
        raise type(error)(place + str(error)) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  the parser raises many kinds; all mean a bad value
        cause = error.__cause__ or error.__context__
        if isinstance(cause, MotionRFTError):
            raise type(cause)(place + str(cause)) from None
        message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise ConfigError(place + message.replace("Group 'config'", "this section").replace("config.", "")) from None


@lru_cache(maxsize=64)
def _parser(kind: type[Any]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", type=kind)
    return parser


def _completed(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with the own defaults of every chosen variant filled in.

    The parser would give an absent field the value that the same name has in the variant it replaces.
    """
    hints, result = get_type_hints(kind), dict(data)
    for name, value in data.items():
        hint = hints.get(name)
        if hint in _VARIANT_BASES:
            result[name] = _with_defaults(hint, value, name)
        elif is_dataclass(hint) and isinstance(value, Mapping):
            result[name] = _completed(hint, value)
    return result


def _with_defaults(base: Any, value: Any, field: str) -> Any:
    choice: Any = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(choice, Mapping) or not isinstance(choice.get("class_path"), str):
        return value
    module, _, name = choice["class_path"].rpartition(".")
    known = _subclasses(base)
    if not module and name not in known:
        raise ConfigError(f"{field}: {name!r} is none of {', '.join(sorted(known))}")
    try:
        variant = getattr(import_module(module), name) if module else _subclasses(base)[name]
    except (ImportError, AttributeError, KeyError):
        return value  # the parser says what is wrong with it
    if not is_dataclass(variant):
        return value
    own = {f.name: f.default for f in fields(variant) if f.init and f.default is not MISSING}
    own |= {f.name: f.default_factory() for f in fields(variant) if f.init and f.default_factory is not MISSING}
    return {**choice, "init_args": {**{k: to_plain(v) for k, v in own.items()}, **(choice.get("init_args") or {})}}


def _subclasses(base: type[Any]) -> dict[str, type[Any]]:
    found = {kind.__name__: kind for kind in base.__subclasses__()}
    return {n: k for kind in found.values() for n, k in _subclasses(kind).items()} | found
