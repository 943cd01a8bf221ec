"""From parsed options to a configuration and a launcher."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from motionrft.cli.console import set_up_logging
from motionrft.cli.launch import Launcher, choose_hardware
from motionrft.config.load import resolve
from motionrft.config.schema import RunConfig
from motionrft.core.errors import ConfigError
from motionrft.core.plain import from_plain, to_plain


def configuration(options: argparse.Namespace, default_preset: str | None = None) -> RunConfig:
    """Return the resolved configuration of a verb's options; the backend's choice of hardware is part of it."""
    preset = options.preset or (None if options.config else default_preset)
    config = resolve(preset, options.profile, options.config, options.fields)
    hardware = choose_hardware(config.hardware, options.backend)
    return from_plain(RunConfig, {**to_plain(config), "hardware": to_plain(hardware)})


def start(options: argparse.Namespace, default_preset: str | None = None) -> tuple[RunConfig, Launcher]:
    """Return configuration and launcher, with logging to the run folder switched on.

    Raises:
        ConfigError: the run folder cannot be written.
    """
    config = configuration(options, default_preset)
    try:
        set_up_logging(options.run_dir, options.debug)
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {options.run_dir}: {error}") from error
    return config, Launcher(config.hardware)


def required(value: str, field: str, made_by: str) -> str:
    """Return an input path, absolute, or explain which command makes it.

    Raises:
        ConfigError: not given, or not there.
    """
    if not value:
        raise ConfigError(f"{field} is not set: give {field}=PATH, made by {made_by}")
    if not Path(value).exists():
        raise ConfigError(f"{field}={value} does not exist; it is made by {made_by}")
    return str(Path(value).resolve())


def command_line() -> list[str]:
    """Return what the user typed."""
    return ["motionrft", *sys.argv[1:]]
