"""Named low-rank adapters on the frozen motion tower, one scoring head each.

PEFT holds the adapters; this module decides when which one is active, names their tensors independently of PEFT, binds
them to the backbone they were trained on, and folds them into plain weights for fast scoring.
"""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from motionrft.core.errors import CheckpointError, explain
from motionrft.core.rng import derive_seed
from motionrft.reward.config import AdapterConfig
from motionrft.reward.encoders import MotionTower
from motionrft.reward.heads import ScoreHead

ADAPTERS = {"preference": 1, "authenticity": 2}
"""Adapter name -> outputs of its head. Authenticity logits are (real, generated)."""

_TARGETS = re.compile(r"encoder\..*\.(self_attn\.[qkvo]_site|linear1|linear2)|proj\.\w+\.\d+")
_SITES = ("q_site", "k_site", "v_site", "o_site")


def tower_fingerprint(tower: MotionTower) -> str:
    """Return the SHA-256 of the tower's weights: what an adapter is bound to.

    Raises:
        ValueError: if adapters were already injected into the tower.
    """
    if any(isinstance(m, LoraLayer) for m in tower.modules()):
        raise ValueError("the tower already carries adapters; take the fingerprint of the plain backbone")
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


class AdaptedTower(nn.Module):
    """The frozen motion tower with its adapters and heads. Nothing is active or trainable until asked for.

    The tower's weights are shared with the module passed in (and frozen there); its layers are new, so that the
    backbone keeps its own clean state dict.

    Args:
        tower: trained backbone tower, built with adapter sites.
        config: adapter size.
        seed: of adapters (update zero at start) and heads.
    """

    def __init__(self, tower: MotionTower, config: AdapterConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.backbone_fingerprint = tower_fingerprint(tower)
        self.tower: MotionTower = copy.deepcopy(tower, {id(p): p for p in tower.parameters()})
        targets = [n for n, m in tower.named_modules() if isinstance(m, nn.Linear) and _TARGETS.fullmatch(n)]
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
            lora_dropout=config.dropout,
            bias="none",
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are the intention
            for name in ADAPTERS:
                torch.manual_seed(derive_seed("reward-adapter", name, seed))
                inject_adapter_in_model(lora, self.tower, adapter_name=name)
            dropout = tower.config.dropout
            self.heads = nn.ModuleDict({n: ScoreHead(tower.config.latent_dim, k, dropout) for n, k in ADAPTERS.items()})
        self._layers = [m for m in self.tower.modules() if isinstance(m, LoraLayer)]
        self._activate(None)
        self.requires_grad_(False)
        self.eval()

    @contextmanager
    def using(self, name: str | None) -> Iterator[MotionTower]:
        """Give the tower with adapter `name` active (None: plain backbone); restore the former state on leaving.

        PEFT's own switches turn gradients on and off as a side effect; here every requires_grad flag stays as it was.
        """
        if name is not None and name not in ADAPTERS:
            raise ValueError(f"unknown adapter {name!r}; known: {list(ADAPTERS)}")
        former = self._active
        self._activate(name)
        try:
            yield self.tower
        finally:
            self._activate(former)

    def _activate(self, name: str | None) -> None:
        flags = [(p, p.requires_grad) for layer in self._layers for p in layer.parameters()]
        for layer in self._layers:
            if name is None:
                layer.enable_adapters(False)
            else:
                layer.enable_adapters(True)
                layer.set_adapter(name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self._active = name

    def forward(
        self, name: str, motion_BTF: Tensor, lengths_B: Tensor, representation: str, t_B: Tensor | None = None
    ) -> Tensor:
        """Return the head's output (B, outputs) of adapter `name` on the posterior mean of normalised motion."""
        with self.using(name) as tower:
            mu, _ = tower(motion_BTF, lengths_B, representation, t_B)
        return self.heads[name](mu)

    def trainable(self, name: str, representations: tuple[str, ...]) -> None:
        """Let adapter `name` and its head require gradients; projections of other representations stay frozen."""
        self.requires_grad_(False)
        self.heads[name].requires_grad_(True)
        for path, parameter in self.tower.named_parameters():
            match = re.search(r"\.lora_[AB]\.(\w+)\.weight$", path)
            if match and match[1] == name:
                projection = re.match(r"proj\.(\w+)\.", path)
                parameter.requires_grad_(projection is None or projection[1] in representations)

    def set_training(self, name: str, mode: bool) -> None:
        """Switch dropout of adapter `name` and its head; the backbone and everything else stay in eval mode."""
        self.eval()
        self.heads[name].train(mode)
        for layer in self._layers:
            layer.lora_dropout[name].train(mode)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Return adapter and head as CPU tensors named `adapter/PATH.lora_A.weight`, `head/fc1.weight`."""
        state = {f"adapter/{path}": p.detach().cpu().clone() for path, p in self._adapter_parameters(name)}
        head = {f"head/{path}": p.detach().cpu().clone() for path, p in self.heads[name].state_dict().items()}
        return state | head

    def load_adapter(self, name: str, state: Mapping[str, Tensor], backbone_fingerprint: str) -> None:
        """Load what `adapter_state` gave.

        Raises:
            CheckpointError: if the adapter belongs to another backbone, or a tensor is missing, unknown or mis-shaped.
        """
        if backbone_fingerprint != self.backbone_fingerprint:
            raise CheckpointError(
                explain(
                    f"an adapter of backbone {self.backbone_fingerprint[:12]}",
                    f"one of backbone {backbone_fingerprint[:12]}",
                    f"adapter {name!r}",
                    "Load the backbone it was trained on, or train the adapter again.",
                )
            )
        own = {f"adapter/{path}": p for path, p in self._adapter_parameters(name)}
        own |= {f"head/{path}": p for path, p in self.heads[name].named_parameters()}
        load_strictly(own, state, f"adapter {name!r}")

    def _adapter_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        suffix = f".{name}.weight"
        for path, parameter in self.tower.named_parameters():
            if path.endswith(suffix) and ".lora_" in path:
                yield path.removesuffix(suffix) + ".weight", parameter

    def backbone_state(self) -> dict[str, Tensor]:
        """Return the plain tower's tensors under their plain names, without adapters."""
        return {
            path.replace(".base_layer.", "."): tensor
            for path, tensor in self.tower.state_dict().items()
            if ".lora_" not in path
        }

    @torch.no_grad()
    def merged(self, name: str | None) -> MotionTower:
        """Return a plain tower, frozen and without sites, that computes what adapter `name` does.

        With the update U = s B A: linear layers W + U; q, k, v projections W (I + U), the residual standing before
        them; output projection (I + U) W with bias (I + U) b, the residual standing after it.
        """
        state = {k: v.detach().clone() for k, v in self.backbone_state().items()}
        if name is not None:
            for path, layer in self.tower.named_modules():
                if isinstance(layer, LoraLayer):
                    _fold(state, path, _update(layer, name))
        with torch.random.fork_rng(devices=[]):
            plain = MotionTower(self.tower.config, sites=False).to(self.tower.token)
        plain.load_state_dict(state)
        return plain.requires_grad_(False).eval()


def _update(layer: LoraLayer, name: str) -> Tensor:
    a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    return layer.scaling[name] * b @ a


def _fold(state: dict[str, Tensor], path: str, update: Tensor) -> None:
    parent, _, leaf = path.rpartition(".")
    if leaf not in _SITES:
        weight = state[f"{path}.weight"]
        state[f"{path}.weight"] = (weight.double() + update).to(weight.dtype)
        return
    target = f"{parent}.{'out_proj' if leaf == 'o_site' else leaf.replace('site', 'proj')}"
    weight, bias = state[f"{target}.weight"], state[f"{target}.bias"]
    if leaf == "o_site":
        state[f"{target}.weight"] = (weight.double() + update @ weight.double()).to(weight.dtype)
        state[f"{target}.bias"] = (bias.double() + update @ bias.double()).to(bias.dtype)
    else:
        state[f"{target}.weight"] = (weight.double() + weight.double() @ update).to(weight.dtype)


@torch.no_grad()
def load_strictly(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Copy `state` into the tensors of `own`; every name and shape must agree.

    Raises:
        CheckpointError: naming what is missing, unknown or mis-shaped.
    """
    problems = [f"missing {n}" for n in sorted(own.keys() - state.keys())]
    problems += [f"unknown {n}" for n in sorted(state.keys() - own.keys())]
    problems += [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(own[n].shape)}"
        for n in sorted(own.keys() & state.keys())
        if own[n].shape != state[n].shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(explain(f"{len(own)} matching tensors", shown, where, "Check sizes and file."))
    for name, tensor in own.items():
        tensor.copy_(state[name])
