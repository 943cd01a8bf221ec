"""`motionrft generate`: captions to motions, as arrays and as a page to watch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from motionrft.cli.common import required, start
from motionrft.cli.main import add_run_arguments
from motionrft.core.errors import CheckpointError, ConfigError, explain
from motionrft.core.rng import stable_key
from motionrft.evaluation.motions import MotionSet
from motionrft.generators.sampling import generate
from motionrft.nn.text import TEXT_ENCODER_HELP, load_text_encoder
from motionrft.report.clips import ClipView
from motionrft.report.html import write_report
from motionrft.training.recipes.generator import load_generator


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("--caption", action="append", default=[], help="what the body does; may be given often")
    parser.add_argument("--captions", type=Path, help="text file, one caption per line")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each motion")
    parser.add_argument("--text-encoder", default="minilm", help=TEXT_ENCODER_HELP)
    add_run_arguments(parser, "runs/generate")


def run(options: argparse.Namespace) -> int:
    """Generate, and write motions.npz (features, joints, lengths) and motions.html."""
    captions = list(options.caption)
    if options.captions is not None:
        if not options.captions.is_file():
            raise ConfigError(f"--captions {options.captions} does not exist")
        captions += [line.strip() for line in options.captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not captions:
        raise ConfigError("no caption: give --caption 'a person walks forward' or --captions FILE")
    config, _ = start(options)
    folder = required(config.inputs.generator, "inputs.generator", "`motionrft pretrain` or `motionrft finetune`")
    generator = load_generator(folder)
    encoder = load_text_encoder(options.text_encoder)
    if encoder.fingerprint != generator.spec.text_encoder:
        raise CheckpointError(
            explain(
                f"the text encoder {generator.spec.text_encoder[:12]} this generator was trained with",
                f"{options.text_encoder} ({encoder.fingerprint[:12]})",
                folder,
                "Give --text-encoder.",
            )
        )
    frames = round(options.seconds * generator.spec.fps)
    if not 2 <= frames <= generator.spec.max_frames:
        limit = generator.spec.max_frames / generator.spec.fps
        raise ConfigError(
            f"--seconds must be between {2 / generator.spec.fps:g} and {limit:g}, got {options.seconds:g}"
        )
    lengths = torch.full((len(captions),), frames)
    keys = torch.tensor([stable_key(f"{i}\x1f{c}") for i, c in enumerate(captions)])
    steps = config.evaluate.num_steps
    motion = generate(generator, None, encoder.encode(captions), lengths, keys, steps, config.seed)
    found = MotionSet(motion, lengths, generator.spec.representation, generator.spec.fps)
    np.savez(
        options.run_dir / "motions.npz",
        motion=motion.numpy(),
        joints=found.joints_NTJ3.numpy(),
        lengths=lengths.numpy(),
        fps=np.array(found.fps),
        representation=np.array(found.representation.value),
        captions=np.array(captions),
    )
    clips = [ClipView(c, [("generated", j.numpy(), found.fps)]) for c, j in zip(captions, found.joints_NTJ3)]
    page = write_report(options.run_dir / "motions.html", {"title": "Generated motions"}, {}, clips)
    print(f"{len(captions)} motions of {frames} frames: {options.run_dir / 'motions.npz'}, {page}")
    return 0
