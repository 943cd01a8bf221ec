"""One process of a layout comparison: `python -m tests.stage_worker JOBS.json`, with RANK and WORLD_SIZE set.

Runs whole training stages, as a Ray Train worker would: DeepSpeed in a gloo group (ZeRO-1, or the stage that a job
names), or one plain process.
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
    from motionrft.runtime import deepspeed_engine
    from motionrft.runtime.collective import TorchCollective

    settings = deepspeed_engine.deepspeed_config

    def shard_everything(*args):
        """Keep no small parameter whole under stage 3: at the size of tests it would shard none."""
        config = settings(*args)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    deepspeed_engine.deepspeed_config = shard_everything

    class GlooRuntime(TorchCollective):
        zero = 1

        def build_engine(self, module, optim):
            return deepspeed_engine.DeepSpeedEngine(module, optim, ZeroConfig(stage=self.zero))

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
        runtime.zero = job.get("zero", 1)
        getattr(importlib.import_module(module), name)(runtime, job["config"], folder, {})
        runtime.barrier()
    end()
