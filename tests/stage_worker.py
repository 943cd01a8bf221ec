"""One process of a layout comparison: `python -m tests.stage_worker JOBS.json`, with RANK and WORLD_SIZE set.

Runs whole training stages, as a Ray Train worker would: DeepSpeed ZeRO-1 in a gloo group, or one plain process.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from motionrft.training.runtime_local import LocalRuntime
from tests.processes import begin, end


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
    jobs = begin()
    runtime = make_runtime()
    for job in jobs:
        module, _, name = job["fn"].partition(":")
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        getattr(importlib.import_module(module), name)(runtime, job["config"], folder, {})
        runtime.barrier()
    end()
