"""`core.protocols.Engine` on DeepSpeed, ZeRO stages 0 to 3: the same numbers as `training.single`, on many processes.

What DeepSpeed leaves to its user, and is done here so that all stages behave alike:
    finiteness   a non-finite loss on one rank refuses the step on all; stage 0 has no check of its own
    norms        stage 0 reports none; clipping there happens in a pre-step hook that also notes the norm
    accumulation `backward` sums, `step` is the boundary (`managed_gradient_accumulation: false`)
    state        full fp32 tensors by parameter name, instead of DeepSpeed's own pickled shards
"""

from __future__ import annotations

import atexit
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from motionrft.config.hardware import ZeroConfig
from motionrft.core.errors import NumericalError
from motionrft.core.protocols import StepInfo
from motionrft.runtime.collective import TorchCollective
from motionrft.training.optim import OptimConfig, param_groups, trainable
from motionrft.training.precision import cast_floats
from motionrft.training.single import clip_gradients
from motionrft.training.state_dict import MOMENTS, check_engine_state, cpu_copy

if not torch.cuda.is_available():
    # Read by DeepSpeed when it is imported: without it, it probes for accelerators and warns.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)


def disable_compiled_extension() -> None:
    """Keep DeepSpeed from building its shared-memory C++ op on CPU: 25 s with a compiler, a crash without.

    Only an inference all-reduce uses it. This touches a private table, hence one function and one test.
    """
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def boot(rank: int = 0) -> None:
    """Prepare this process for DeepSpeed; without a process group, create one of one process until exit.

    DeepSpeed remembers the first group it saw, so a group lives as long as the process.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    disable_compiled_extension()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave_group)


def _leave_group() -> None:
    """Processes that exit inside a group sometimes abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def deepspeed_config(optim: OptimConfig, zero: ZeroConfig, world: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for these settings."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the loop owns batches
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "managed_gradient_accumulation": False,
        # Stage 0 clips in a hook of ours, which needs the norm before clipping.
        "gradient_clipping": optim.grad_clip if zero.stage > 0 else 0.0,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
        "optimizer": {
            "type": "AdamW",
            # torch_adam: torch's AdamW everywhere, so that nothing is compiled and all stages share one update rule.
            "params": {
                "lr": optim.lr,
                "betas": list(optim.betas),
                "eps": optim.eps,
                "weight_decay": 0.0,
                "torch_adam": True,
            },
        },
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": zero.bucket_size,
            "allgather_bucket_size": zero.bucket_size,
            "overlap_comm": False,
        },
    }
    if zero.stage == 3:
        del config["zero_optimization"]["allgather_bucket_size"]
        config["zero_optimization"]["stage3_prefetch_bucket_size"] = zero.bucket_size
    if zero.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if zero.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if zero.precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


class DeepSpeedEngine:
    """One process's share of a DeepSpeed run. Constructing it is a collective.

    Args:
        module: on its device; under stage 3 its parameters are sharded from here on and must only be read in `forward`.
        optim: AdamW settings.
        zero: stage, precision, buckets.

    Attributes:
        module: the bare module.
        steps: optimiser steps applied.
        skipped: optimiser steps refused because loss or gradient was not finite on some rank.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, zero: ZeroConfig) -> None:
        boot(dist.get_rank() if dist.is_initialized() else 0)
        self._collective = TorchCollective(next(module.parameters()).device)
        self._optim, self._zero = optim, zero
        self._shapes = {name: tuple(p.shape) for name, p in trainable(module)}
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=param_groups(module, optim),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, optim.lr_factor),
            config=deepspeed_config(optim, zero, self._collective.world),
        )
        self.module = self._engine.module
        self.steps = 0
        self.skipped = 0
        self._refused = False
        self._norm = 0.0
        if zero.stage == 0:
            self._base.register_step_pre_hook(self._clip_and_note_norm)

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The torch optimiser, inside ZeRO's wrapper if there is one."""
        optimizer = self._engine.optimizer
        return optimizer if self._zero.stage == 0 else optimizer.optimizer

    def _params(self) -> list[nn.Parameter]:
        return [p for _, p in trainable(self.module)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through the engine; floating-point outputs are fp32 whatever happened inside."""
        if self._zero.precision == "fp32":
            return self._engine(*args, **kwargs)
        if self._zero.precision == "bf16":
            args, kwargs = cast_floats(args, torch.bfloat16), cast_floats(kwargs, torch.bfloat16)
        return cast_floats(self._engine(*args, **kwargs), torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's mean loss. All ranks call it equally often."""
        if not self._collective.all_true(bool(torch.isfinite(loss.detach()))):
            self._refused = True
        # A refused step still runs its backward, poisoned: every rank then issues the same communication, and
        # ZeRO's own overflow path clears all the buffers that gradients may have reached.
        self._engine.backward(loss * math.nan if self._refused else loss)

    def step(self) -> StepInfo:
        """Average over ranks, clip, check finiteness over all ranks, update, schedule, zero gradients."""
        lr = self._optim.lr * self._optim.lr_factor(self.steps)
        applied = self._step_replicated() if self._zero.stage == 0 else self._step_sharded()
        self._refused = False
        if applied:
            self.steps += 1
        else:
            self.skipped += 1
        return StepInfo(applied=applied, grad_norm=self._norm if applied else float("inf"), lr=lr)

    def _step_replicated(self) -> bool:
        finite = all(bool(torch.isfinite(p.grad).all()) for p in self._params() if p.grad is not None)
        if not self._collective.all_true(finite and not self._refused):
            self._engine.zero_grad()
            return False
        for p in self._params():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._engine.step()
        return True

    def _step_sharded(self) -> bool:
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        self._norm = float(self._engine.get_global_grad_norm() or 0.0)
        if self._zero.stage == 3:
            # DeepSpeed overwrites this buffer per parameter at its first use and never clears it: a parameter that
            # the next batch does not use would be stepped with its old gradient.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        return applied

    def _clip_and_note_norm(self, *_: Any) -> None:
        """Runs between averaging and the update at stage 0, where DeepSpeed clips without telling the norm."""
        self._norm = float(clip_gradients(self._params(), self._optim.grad_clip))
        if not math.isfinite(self._norm):
            # Every rank's own gradient was finite: only their sum overflowed.
            raise NumericalError(f"averaged gradient norm is {self._norm} although every rank's was finite; lower lr")

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Collective: return the whole trainable parameters by name, fp32, on every rank."""
        if self._zero.stage == 0:
            return {name: p.detach() for name, p in trainable(self.module)}
        return {name: safe_get_full_fp32_param(p).detach() for name, p in trainable(self.module)}

    def export_state(self) -> dict[str, Tensor]:
        """Collective: full fp32 parameters and moments on CPU at rank 0, nothing elsewhere."""
        state = {}
        for name, p in trainable(self.module):
            for key, full in self._full_tensors(p).items():
                if self._collective.rank == 0:
                    empty = torch.zeros(self._shapes[name])
                    state[f"{key}/{name}"] = cpu_copy(full if full is not None else empty).view(self._shapes[name])
        return state

    def _full_tensors(self, p: nn.Parameter) -> dict[str, Tensor | None]:
        if self._zero.stage == 0:
            return {"param": p, **{key: self._base.state.get(p, {}).get(key) for key in MOMENTS}}
        started = self.steps > 0  # ZeRO creates the moments at the first applied step
        self._link_moments()
        moments = {key: safe_get_full_optimizer_state(p, key) if started else None for key in MOMENTS}
        return {"param": safe_get_full_fp32_param(p), **moments}

    def import_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Collective: restore what `export_state` gave, whatever world size or stage wrote it. All ranks pass `state`.

        Raises:
            CheckpointError: if names or shapes differ from the module's trainable parameters.
        """
        check_engine_state(self.module, state, self._shapes)
        if self._zero.stage == 0:
            self._import_replicated(state, step)
        else:
            self._import_sharded(state, step)
        self._engine.global_steps = step
        scheduler = self._engine.lr_scheduler
        scheduler.last_epoch = step
        for group in self._base.param_groups:
            group["lr"] = self._optim.lr * self._optim.lr_factor(step)
        scheduler._last_lr = [group["lr"] for group in self._base.param_groups]
        self.steps = step
        self._refused = False

    def _import_replicated(self, state: Mapping[str, Tensor], step: int) -> None:
        with torch.no_grad():
            for name, p in trainable(self.module):
                p.copy_(state[f"param/{name}"])
                moments = {key: state[f"{key}/{name}"].to(p.device, p.dtype, copy=True) for key in MOMENTS}
                self._base.state[p] = {"step": torch.tensor(float(step)), **moments}
        self._engine.zero_grad()

    def _import_sharded(self, state: Mapping[str, Tensor], step: int) -> None:
        self._null_step()
        self._link_moments()
        for name, p in trainable(self.module):
            full = state[f"param/{name}"].to(self._collective.device)
            moments = {key: state[f"{key}/{name}"].to(self._collective.device) for key in MOMENTS}
            self._set_master(p, full, moments)
            # The master is not what forward uses: those weights are set as well.
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=self._zero.stage == 3):
                if self._zero.stage < 3 or self._collective.rank == 0:
                    p.data.copy_(full)
        for entry in self._base.state.values():
            entry["step"] = torch.tensor(float(step))

    def _set_master(self, p: nn.Parameter, full: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Write this rank's share of the fp32 master copy and of the moments."""
        if self._zero.stage < 3:
            safe_set_full_fp32_param(p, full)
            for key, value in moments.items():
                safe_set_full_optimizer_state(p, value, key)
            return
        # Stage 3 has no setter for full tensors whose size the world does not divide; shares are padded with zeros.
        safe_set_local_fp32_param(p, self._share(p, full))
        for key, value in moments.items():
            safe_set_local_optimizer_state(p, self._share(p, value), key)

    def _share(self, p: nn.Parameter, full: Tensor) -> Tensor:
        size = p.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = full.new_zeros(size * self._collective.world)
        padded[: full.numel()] = full.flatten()
        return padded[self._collective.rank * size :][:size]

    def _null_step(self) -> None:
        """Make ZeRO create its moments, which exist only after a first step: zero gradients at learning rate 0."""
        for group in self._base.param_groups:
            group["lr"] = 0.0
        with deepspeed.zero.GatheredParameters(self._params(), enabled=self._zero.stage == 3):
            self._engine.backward(torch.stack([(p * 0.0).sum().float() for p in self._params()]).sum())
        self._engine.step()

    def _link_moments(self) -> None:
        """Let stages 1 and 2 find the moments of every parameter group.

        DeepSpeed links all groups right after the first group's first update, when the moments of the later groups
        do not exist yet, and never again; with more than one group they would stay invisible.
        """
        if self._zero.stage in (1, 2):
            zero = self._engine.optimizer
            for params, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                if flat in zero.optimizer.state:
                    lazy_init_hp_params_optimizer_state(params, flat, zero.optimizer.state)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; the process group stays for the next engine."""
        self._engine.destroy()
