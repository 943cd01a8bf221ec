"""Real processes for layout tests: start W of them on a list of jobs, and what each does at start and end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def launch(module: str, jobs: list[dict[str, Any]], world: int, folder: Path, timeout_s: float = 240) -> None:
    """Run `python -m MODULE JOBS.json` in W processes and fail with the output of one that failed."""
    listing = folder / f"jobs{len(list(folder.glob('jobs*.json')))}.json"
    listing.write_text(json.dumps(jobs))
    processes = []
    for rank in range(world):
        layout = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", module, str(listing)],
                cwd=Path(__file__).resolve().parents[1],
                env={**os.environ, **layout},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for rank, process in enumerate(processes):
        output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, f"rank {rank} of {world} failed:\n{output[-4000:]}"


def begin() -> list[dict[str, Any]]:
    """Join the group, if there is more than one process, and return the jobs named on the command line."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{sys.argv[1]}.store",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    return json.loads(Path(sys.argv[1]).read_text())  # type: ignore[no-any-return]


def end() -> None:
    """Leave without tearing the group down.

    Everything is on disk. Gloo's threads sometimes abort a process that tears its group down while its peer leaves too
    ("terminate called without an active exception").
    """
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
