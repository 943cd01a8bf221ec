"""CLIP's text tower under OpenAI's names: the same function, there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from motionrft.core.errors import CheckpointError
from motionrft.nn.clip_openai import from_openai, to_openai
from tests.text_model_fixtures import randomise

WIDTH, HEADS, BLOCKS, JOINT = 16, 2, 2, 12
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
SIZES |= {"num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "projection_dim": JOINT, "eos_token_id": 39}


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng(devices=[]):
        tower = CLIPTextModelWithProjection(CLIPTextConfig(**SIZES)).double().eval()
    randomise(tower, 3)
    return tower


def openai_forward(w: dict[str, Tensor], ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return states after the final norm and the projected state of the greatest token, as OpenAI's CLIP does."""
    length = ids_BL.shape[1]
    x = w["token_embedding.weight"][ids_BL] + w["positional_embedding"][:length]
    mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    for block in range(BLOCKS):
        p = f"transformer.resblocks.{block}"
        h = norm(x, f"{p}.ln_1").transpose(0, 1)
        h, _ = F.multi_head_attention_forward(
            h, h, h, WIDTH, HEADS, w[f"{p}.attn.in_proj_weight"], w[f"{p}.attn.in_proj_bias"], None, None, False, 0.0,
            w[f"{p}.attn.out_proj.weight"], w[f"{p}.attn.out_proj.bias"], training=False, attn_mask=mask,
            need_weights=False,
        )  # fmt: skip
        x = x + h.transpose(0, 1)
        h = F.linear(norm(x, f"{p}.ln_2"), w[f"{p}.mlp.c_fc.weight"], w[f"{p}.mlp.c_fc.bias"])
        x = x + F.linear(h * torch.sigmoid(1.702 * h), w[f"{p}.mlp.c_proj.weight"], w[f"{p}.mlp.c_proj.bias"])
    x = norm(x, "ln_final")
    return x, x[torch.arange(len(x)), ids_BL.argmax(1)] @ w["text_projection"]


def test_openais_network_with_openais_names_computes_the_same(model: Any) -> None:
    ids_BL = torch.tensor([[38, 5, 9, 39, 0, 0], [38, 1, 2, 3, 4, 39]])
    states, projected = openai_forward(to_openai(model.state_dict()), ids_BL)
    with torch.no_grad():
        want = model(input_ids=ids_BL)
    torch.testing.assert_close(states, want.last_hidden_state, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(projected, want.text_embeds, atol=1e-10, rtol=1e-10)


def test_there_and_back_changes_nothing_and_leaves_the_rest_of_a_checkpoint_out(model: Any) -> None:
    checkpoint = to_openai(model.state_dict(), "clip.")
    assert set(checkpoint) == {f"clip.{name}" for name in to_openai(model.state_dict())}
    rest = {"clip.visual.conv1.weight": torch.ones(1), "clip.logit_scale": torch.ones(()), "out.weight": torch.ones(2)}
    state = from_openai({**checkpoint, **rest}, "clip.")
    with torch.random.fork_rng(devices=[]):
        other = CLIPTextModelWithProjection(CLIPTextConfig(**SIZES)).double().eval()
    other.load_state_dict(state)  # strict
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    ids_BL = torch.tensor([[38, 5, 9, 39]])
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids_BL).text_embeds, model(input_ids=ids_BL).text_embeds)
    addresses = {t.untyped_storage().data_ptr() for t in state.values()}
    assert len(addresses) == len(state)  # storable as separate tensors


def test_names_and_shapes_are_those_published_for_vit_b_32() -> None:
    with torch.device("meta"):
        tower = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=512))
    tensors = to_openai(tower.state_dict())
    assert len(tensors) == 149  # and the temperature makes the 150 of a MotionDiffuse checkpoint
    assert tuple(tensors["transformer.resblocks.11.attn.in_proj_weight"].shape) == (1536, 512)
    assert tuple(tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape) == (2048, 512)
    assert tuple(tensors["positional_embedding"].shape) == (77, 512)
    assert tuple(tensors["text_projection"].shape) == (512, 512)
    back = from_openai(tensors)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in tower.state_dict().items()}


def test_missing_and_unknown_names_are_told(model: Any) -> None:
    tensors = to_openai(model.state_dict())
    name = "transformer.resblocks.0.ln_2.bias"
    with pytest.raises(CheckpointError, match=rf"2 blocks.*missing \['{name}'\]"):
        from_openai({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=r"unknown \['bias'\]"):
        from_openai({**tensors, "bias": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"below 'clip\.'.*missing"):
        from_openai(tensors, "clip.")
    with pytest.raises(CheckpointError, match=r"missing \['text_projection\.weight'\]"):
        to_openai({n: t for n, t in model.state_dict().items() if n != "text_projection.weight"})
