"""`motionrft prepare`: any source to a dataset folder."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from data_prep.pipeline import add_text, prepare
from motionrft.cli.common import start
from motionrft.cli.console import progress_line
from motionrft.cli.main import add_run_arguments

_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("--source", choices=("synthetic", "bvh", "humanml3d"), help="kind of source")
    parser.add_argument("--path", help="folder or archive of the source")
    parser.add_argument("--out", required=True, help="dataset folder to write")
    parser.add_argument(
        "--add-text", default="", metavar="ENCODER", help="encode the captions of the finished dataset OUT once more"
    )
    add_run_arguments(parser, "runs/prepare")


def run(options: argparse.Namespace) -> int:
    """Prepare a dataset and print its quality summary."""
    given = {"source": options.source, "path": options.path, "out": str(Path(options.out).resolve())}
    if options.path and not Path(options.path).exists():
        from motionrft.core.errors import DataError

        raise DataError(f"--path {options.path} does not exist")
    if options.source not in (None, "synthetic"):
        options.fields = ["prepare.families=[]", *options.fields]  # a preset may name families to generate
    options.fields = [*(f"prepare.{name}={value}" for name, value in given.items() if value), *options.fields]
    options.run_dir = Path(options.out).parent / f".{Path(options.out).name}.prepare"
    config, launcher = start(options)
    if options.add_text:
        with launcher.session(), progress_line("prepare") as tell:
            root, cache = Path(config.prepare.out), config.prepare.text_cache
            added = add_text(root, options.add_text, cache, launcher.prepare_workers, tell)
        print(f"{added.file.rows} captions by {added.name} (fingerprint {added.fingerprint}) added to {root}")
        return 0
    with launcher.session(), progress_line("prepare") as tell:
        report = prepare(replace(config.prepare, workers=launcher.prepare_workers), tell)
    print(report.summary)
    print(f"dataset {report.root}: {dict(report.clips)} clips, {report.captions} captions, "
          f"{report.seconds['total']:.1f} s")  # fmt: skip
    return 0
