"""One process of a layout comparison: `python -m tests.stage_worker JOBS.json`, with RANK and WORLD_SIZE set.

Runs whole training stages, as a Ray Train worker would: DeepSpeed ZeRO-1 in a gloo group, or one plain process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from motionrft.training.runtime_local import LocalRuntime


def make_runtime():
    if int(os.environ["WORLD_SIZE"]) == 1:
        return LocalRuntime()
    from motionrft.config.hardware import ZeroConfig
    from motionrft.runtime.collective import TorchCollective
    from motionrft.runtime.deepspeed_engine import DeepSpeedEngine

    class GlooRuntime(TorchCollective):
        def build_engine(self, module, optim):
            return DeepSpeedEngine(module, optim, ZeroConfig(stage=1))

        def report(self, metrics, checkpoint_dir=None):
            self.barrier()

    return GlooRuntime()


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{sys.argv[1]}.store",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    runtime = make_runtime()
    for job in jobs:
        module, _, name = job["fn"].partition(":")
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        getattr(importlib.import_module(module), name)(runtime, job["config"], folder, {})
        runtime.barrier()
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(0)  # gloo sometimes aborts a process that tears its group down while its peer leaves too
