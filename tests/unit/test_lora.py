"""Low-rank adapters of generators: what they compute, what they leave alone, what merging gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from motionrft.core.errors import CheckpointError, ConfigError
from motionrft.core.protocols import GeneratorSpec
from motionrft.core.types import Representation
from motionrft.generators.base import Build
from motionrft.generators.lora import Adapter, adapter_for, adapter_state, add_adapter, merge_adapter
from motionrft.generators.mdm import MDMConfig, MDMGenerator
from motionrft.generators.registry import FAMILIES
from motionrft.representations.normalize import Normalizer

KIND = Representation.ROTATION


def network() -> nn.Module:
    torch.manual_seed(0)
    spec = GeneratorSpec("mdm", KIND, 20.0, 24, "stub", "x0", 1000, 2.5)
    statistics = Normalizer(torch.zeros(135), torch.ones(135), KIND)
    config = MDMConfig(latent_dim=16, layers=2, heads=2, ff=24, dropout=0.0)
    return MDMGenerator(Build(spec, statistics, 12, 12), config).network.eval()


def output(module: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    tokens, x = torch.randn(3, 4, 12, generator=draw), torch.randn(3, 9, 135, generator=draw)
    mask, keep = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    return module(x, torch.tensor([3, 40, 900]), tokens, mask, tokens.mean(1), keep, torch.tensor([9, 5, 2]))


def randomise(module: nn.Module) -> None:
    draw = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)


def test_an_adapter_starts_without_effect_and_alone_is_trained() -> None:
    plain, adapted = network(), network()
    names = add_adapter(adapted, adapter_for(MDMConfig(), 4, 8.0))
    assert {"seqTransEncoder.layers.1.self_attn.out_proj", "seqTransEncoder.layers.0.linear2"} < set(names)
    torch.testing.assert_close(output(adapted), output(plain), rtol=0, atol=0)
    output(adapted).square().sum().backward()
    changed = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert changed == {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert changed and all(".lora_" in name for name in changed) and len(changed) == 2 * len(names)


def test_the_update_is_alpha_over_rank_times_b_a_and_merges_into_plain_weights() -> None:
    adapted = network()
    add_adapter(adapted, Adapter(2, 5.0, r".*linear1"))  # scale 2.5: a fixed scale of 2 would show
    randomise(adapted)
    state = adapter_state(dict(adapted.named_parameters()))
    assert set(state) == {f"seqTransEncoder.layers.{i}.linear1.lora_{x}.weight" for i in (0, 1) for x in "AB"}
    merged = network()
    before = merged.get_parameter("seqTransEncoder.layers.1.linear1.weight").detach().clone()
    merge_adapter(merged, state, 2.5)
    layer = "seqTransEncoder.layers.1.linear1"
    by_hand = before + 2.5 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
    torch.testing.assert_close(merged.get_parameter(f"{layer}.weight"), by_hand)
    torch.testing.assert_close(output(merged), output(adapted), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(merged), output(network()), atol=1e-2)


def test_what_cannot_be_merged_or_placed_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no such layer"):
        merge_adapter(network(), {"nowhere.lora_A.weight": torch.ones(1, 2)}, 1.0)
    wrong = {f"seqTransEncoder.layers.0.linear1.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}
    with pytest.raises(CheckpointError, match=r"\(3, 3\)"):
        merge_adapter(network(), wrong, 1.0)
    with pytest.raises(ConfigError, match="matches"):
        add_adapter(network(), Adapter(2, 4.0, "nothing"))
    with pytest.raises(ConfigError, match="default"):
        adapter_for(MDMConfig(), 2, 4.0, "everything")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_says_where_adapters_go(family: str) -> None:
    assert adapter_for(FAMILIES[family][0](), 8, 16.0).targets
