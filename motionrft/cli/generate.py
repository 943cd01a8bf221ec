"""`motionrft generate`: captions to motions, as arrays, BVH files and a page to watch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from motionrft.cli.common import command_line, required, start
from motionrft.cli.main import add_run_arguments
from motionrft.config.load import write_run_config
from motionrft.core.errors import ConfigError
from motionrft.evaluation.motions import MotionSet
from motionrft.nn.text import TEXT_ENCODER_HELP
from motionrft.report.bvh import write_bvh
from motionrft.report.clips import ClipView
from motionrft.report.html import write_report
from motionrft.training.recipes.generate_captions import GenerateRequest, Prompt, generate_captions, read_prompts


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""
    parser.add_argument("--model", default="", help="model folder (the same as inputs.generator=FOLDER)")
    parser.add_argument("--caption", action="append", default=[], help="what the body does; may be given often")
    parser.add_argument("--captions", help="text file, one caption per line, optionally a tab and its seconds; or text")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of motions whose line does not say")
    parser.add_argument("--samples", type=int, default=1, help="motions per caption")
    parser.add_argument("--steps", type=int, default=0, help="denoising steps; default: the generator's own")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the generator's own")
    parser.add_argument("--batch-size", type=int, default=32, help="motions per network call, at most 32")
    parser.add_argument("--text-encoder", default="minilm", help=TEXT_ENCODER_HELP)
    parser.add_argument("--compile", action="store_true", help="compile the network (needs a C++ compiler)")
    parser.add_argument("--no-bvh", action="store_true", help="write no BVH files")
    parser.add_argument("--page-clips", type=int, default=24, help="motions shown in the page")
    add_run_arguments(parser, "runs/generate")
    parser.add_argument("--out", dest="run_dir", type=Path, help="folder to write (the same as --run-dir)")


def run(options: argparse.Namespace) -> int:
    """Generate, and write motions.npz (features, joints, lengths), bvh/ and motions.html."""
    if options.samples < 1 or not 1 <= options.batch_size <= 32 or options.steps < 0:
        raise ConfigError("--samples must be at least 1, --batch-size 1 to 32, --steps at least 0")
    prompts = _prompts(options)
    if options.model:
        options.fields = [*options.fields, f"inputs.generator={options.model}"]
    config, launcher = start(options)
    folder = required(config.inputs.generator, "inputs.generator", "`motionrft pretrain`, `finetune` or `import`")
    device = "cuda" if config.hardware.workers.use_gpu else "cpu"
    request = GenerateRequest(
        folder,
        options.text_encoder,
        options.steps,
        config.seed,
        options.guidance,
        options.batch_size,
        device,
        options.compile,
    )
    write_run_config(options.run_dir, config, command_line())
    with launcher.session():
        found = generate_captions(launcher.executor(), request, prompts)
    np.savez(
        options.run_dir / "motions.npz",
        motion=found.motion_NTD.numpy(),
        joints=found.joints_NTJ3.numpy(),
        lengths=found.lengths_N.numpy(),
        fps=np.array(found.fps),
        representation=np.array(found.representation.value),
        captions=np.array([p.caption for p in prompts]),
    )
    if not options.no_bvh:
        _write_bvh(options.run_dir / "bvh", found, prompts)
    lengths = found.lengths_N.tolist()
    clips = [
        ClipView(p.caption, [("generated", j[:n].numpy(), found.fps)])
        for p, j, n in zip(prompts[: options.page_clips], found.joints_NTJ3, lengths)
    ]
    page = write_report(options.run_dir / "motions.html", {"title": "Generated motions"}, {}, clips)
    print(
        f"{len(prompts)} motions of {min(lengths)} to {max(lengths)} frames: {options.run_dir / 'motions.npz'}, {page}"
    )
    return 0


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    given = [Prompt(c, options.seconds, s) for c in options.caption for s in range(options.samples)]
    if options.captions:
        path = Path(options.captions)
        looks_like_text = " " in options.captions and not path.exists() and not path.suffix
        if looks_like_text:
            given += [Prompt(options.captions, options.seconds, s) for s in range(options.samples)]
        else:
            given += read_prompts(path, options.seconds, options.samples)
    if not given:
        raise ConfigError("no caption: give --caption 'a person walks forward' or --captions FILE")
    return given


def _write_bvh(folder: Path, motions: MotionSet, prompts: list[Prompt]) -> None:
    for i, (prompt, motion, length) in enumerate(zip(prompts, motions.motion_NTD, motions.lengths_N.tolist())):
        name = re.sub(r"[^a-z0-9]+", "_", prompt.caption.lower()).strip("_")[:40]
        write_bvh(folder / f"{i:04}_{name}.bvh", motion[:length], motions.representation, motions.fps)
