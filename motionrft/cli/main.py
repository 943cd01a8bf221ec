"""`motionrft VERB`: one parser, one place where errors become messages and exit codes.

Exit codes: 0 done, 1 a defect (with traceback), 2 something the user can correct, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from motionrft.core.errors import MotionRFTError

# Verb -> (module, one line). Modules are imported when their verb is called: `motionrft --help` costs nothing.
VERBS = {
    "prepare": ("motionrft.cli.prepare", "any source -> dataset: shards, statistics, text features"),
    "pretrain": ("motionrft.cli.train", "train a small generator from scratch"),
    "evaluator": ("motionrft.cli.train", "train an evaluator: the network that only measures"),
    "reward": ("motionrft.cli.train", "train the reward model: semantic stage, pairs, adapters"),
    "reward score": ("motionrft.cli.reward", "every reward term of motions in files"),
    "reward evaluate": ("motionrft.cli.reward", "retrieval, preference and authenticity of a reward, with intervals"),
    "reward ablate": ("motionrft.cli.reward", "the reward with and without SPL, sharing, or noise"),
    "finetune": ("motionrft.cli.train", "fine-tune a generator on the reward"),
    "compare": ("motionrft.cli.compare", "fine-tuning methods side by side on one model"),
    "merge-adapters": ("motionrft.cli.merge_adapters", "low-rank adapters and their base -> one whole model"),
    "tune": ("motionrft.cli.tune", "search over `finetune` with Ray Tune"),
    "generate": ("motionrft.cli.generate", "captions -> motions"),
    "evaluate": ("motionrft.cli.evaluate", "score generators on a split, with intervals"),
    "import": ("motionrft.cli.released", "released weights -> checkpoints of this project, strict and safe"),
    "export": ("motionrft.cli.released", "checkpoints of this project -> the files they were released as"),
    "report": ("motionrft.cli.report", "one HTML page of a run folder"),
    "quickstart": ("motionrft.cli.quickstart_verb", "all of the above, small, on this machine"),
    "bench": ("motionrft.cli.bench", "measure: memory, convert, ingest"),
    "doctor": ("motionrft.cli.doctor", "what is installed, what is missing, what provides it"),
}

_DISK = {
    errno.ENOSPC: "the disk is full: free some space, or choose another folder; --resume continues from what is whole",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another folder; --resume continues",
    errno.EROFS: "the folder is on a read-only disk: choose another one",
    errno.EACCES: "no permission to write or read here: choose another folder, or change its owner",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if " ".join(arguments[:2]) in VERBS:  # "reward score" is one verb
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
    parser = _parser(arguments[0] if arguments else "")
    options = parser.parse_args(arguments)
    if not options.verb:
        parser.print_help()
        return 0
    debug = bool(getattr(options, "debug", False))
    try:
        module = importlib.import_module(VERBS[options.verb][0])
        return int(module.run(options) or 0)
    except KeyboardInterrupt as stopped:
        print(f"\nstopped: {stopped or 'by Ctrl-C'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except MotionRFTError as error:
        if debug:
            raise
        print(f"\nmotionrft {options.verb}: {type(error).__name__}\n  {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if debug or error.errno not in _DISK:
            raise
        print(f"\nmotionrft {options.verb}: {_DISK[error.errno]}\n  {error}", file=sys.stderr)
        return 2
    finally:
        logging.shutdown()


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="motionrft", description="Reinforcement fine-tuning of text-to-motion models."
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, (module, text) in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text)
        if name == verb:  # only the called verb pays for its imports
            importlib.import_module(module).add_arguments(sub, name)
            sub.add_argument("--debug", action="store_true", help="show tracebacks and debug records")
    return parser


def add_run_arguments(parser: argparse.ArgumentParser, run_dir: str) -> None:
    """Add what every verb with a run folder takes."""
    parser.add_argument("--preset", help="quickstart, smoke, paper, upstream, small-acmdm, small-hymotion ...")
    parser.add_argument("--profile", help="hardware: cpu2, gpu1, gpu8, nodes4x8, or a YAML file")
    parser.add_argument("--config", action="append", default=[], type=Path, help="YAML file; later ones win")
    parser.add_argument("--run-dir", type=Path, default=Path(run_dir), help=f"run folder (default {run_dir})")
    parser.add_argument("--resume", action="store_true", help="continue what is in the run folder")
    parser.add_argument("--backend", choices=("single", "deepspeed"), help="one plain process, or Ray with DeepSpeed")
    parser.add_argument(
        "fields", nargs="*", metavar="FIELD=VALUE", help="configuration fields, e.g. finetune.optim.lr=1e-5"
    )


if __name__ == "__main__":
    sys.exit(main())
