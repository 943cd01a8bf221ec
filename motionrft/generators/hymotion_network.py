"""The network of the HY-Motion family: a flow's velocity from motion frames, text tokens and a sentence vector.

One class covers the released models and the small from-scratch one; they differ in the fields of `HYMotionConfig` only.
Parameter names are those of the released checkpoints below "motion_transformer."; the two learned features of the empty
caption keep their released names as well. Letters: B batch, T frames, N positions, L text tokens, C text features,
D motion features, E width. Masks are bool, True = valid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from motionrft.core.errors import ConfigError
from motionrft.core.types import Representation, valid_mask
from motionrft.diffusion.prediction import FLOW_OUTPUTS, flow_remaining
from motionrft.generators.base import ModelConfig
from motionrft.generators.hymotion_blocks import (
    DoubleBlock,
    FinalLayer,
    Projection,
    SingleBlock,
    TextRefiner,
    TimeEncoder,
    rotary_table,
    with_self,
)

FPS_MODES = ("resample", "upstream")
_LORA = r"double_blocks\.\d+\.(motion|text)_(qkv|out_proj|mlp\.fc[12])|.+\.(self_attn_(qkv|proj)|mlp\.fc[12])"


@dataclass(frozen=True)
class HYMotionConfig(ModelConfig):
    """Sizes and variant. Defaults are the small from-scratch model; `FULL` and `LITE` are the released ones."""

    family = "hymotion"
    representations = (Representation.ROTATION,)
    prediction = "velocity"
    solvers = ("euler",)
    default_guidance = 5.0
    default_lora_rank = 8
    lora_targets: ClassVar = {"full": rf"{_LORA}|single_blocks\.\d+\.linear[12]", "upstream": _LORA}

    width: int = 96
    """Token width E."""
    heads: int = 3
    """Attention heads per block."""
    double_blocks: int = 1
    """Blocks in which motion and text have weights of their own; a third of the released depth."""
    single_blocks: int = 2
    """Blocks with common weights, after them."""
    refiner_blocks: int = 1
    """Blocks of text tokens alone, before them."""
    mlp_ratio: int = 4
    """Hidden width of the MLPs over E."""
    token_dim: int = 384
    """Features of a text token."""
    pooled_dim: int = 384
    """Features of the sentence vector."""
    pooled_gain: float = 20.0
    """Factor on the sentence vector: unit-norm vectors of C features are read as weak noise without sqrt(C), here of
    384 features. The released models read theirs as they are."""
    joint_positions: bool = False
    """The state holds 66 joint positions behind the 135 features, which decoding ignores (the released layout)."""
    train_frames: int = 80
    """Longest motion in model frames; text positions start behind it, however long the motion is."""
    min_frames: int = 1
    """Shortest motion in model frames; shorter ones are cut out of one that long."""
    band_frames: int = 40
    """Frames see frames up to this many before and after (and all text)."""
    native_fps: float = 0.0
    """Frame rate of the state; 0 = that of the motion."""
    fps_mode: str = "resample"
    """Where the rates differ: "resample", or "upstream": take the state's frames for motion frames, as the released
    fine-tuning code does, which plays motion at another speed."""
    rest_pelvis: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Pelvis position minus the state's translation, metres: where the body's own origin is not its pelvis."""
    text_dropout: float = 0.1
    """Probability of training a clip with the learned features of the empty caption."""
    output: str = "clean"
    """What the last layer gives: "velocity" (the released models), or "clean": the motion, from which the velocity
    follows. A velocity carries all of the noise, for which a small network is too narrow; a clean motion does not."""
    frame_weight: float = 100.0
    """Weight of the frame-difference error in the pre-training loss. Differences of neighbouring frames are about a
    quarter as large as the features, and an error in them is what shows as trembling."""
    zero_final: bool = True
    """Start with zero velocity. The released models' last layer starts at random."""
    checkpoint_blocks: bool = False
    """Keep only block inputs for the backward pass and compute the rest again: less memory, a third more time."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        sizes = ("width", "heads", "mlp_ratio", "token_dim", "pooled_dim", "train_frames", "min_frames", "band_frames")
        counts = ("double_blocks", "single_blocks", "refiner_blocks")
        rules = [(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}") for name in sizes]
        rules += [(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}") for name in counts]
        rules += [
            (
                self.heads < 1 or self.width % (2 * self.heads) == 0,
                f"width must be a multiple of 2 * heads, got {self.width} and {self.heads}",
            ),
            (self.min_frames <= self.train_frames, f"min_frames {self.min_frames} is above train_frames"),
            (self.pooled_gain > 0, f"pooled_gain must be positive, got {self.pooled_gain}"),
            (self.native_fps >= 0, f"native_fps must be >= 0, got {self.native_fps}"),
            (self.output in FLOW_OUTPUTS, f"output must be one of {FLOW_OUTPUTS}, got {self.output!r}"),
            (self.frame_weight >= 0, f"frame_weight must be >= 0, got {self.frame_weight}"),
            (self.fps_mode in FPS_MODES, f"fps_mode must be one of {FPS_MODES}, got {self.fps_mode!r}"),
            (0 <= self.text_dropout < 1, f"text_dropout must be in [0, 1), got {self.text_dropout}"),
        ]
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise ConfigError("hymotion: " + "; ".join(problems))

    @property
    def features(self) -> int:
        """Feature count D of the state."""
        return 201 if self.joint_positions else Representation.ROTATION.dim


def _released(width: int, heads: int, depth: int) -> HYMotionConfig:
    return HYMotionConfig(
        width=width,
        heads=heads,
        double_blocks=depth // 3,
        single_blocks=2 * depth // 3,
        refiner_blocks=2,
        token_dim=4096,
        pooled_dim=768,
        pooled_gain=1.0,
        joint_positions=True,
        train_frames=360,
        min_frames=20,
        band_frames=60,
        native_fps=30.0,
        # The neutral body's pelvis in its own coordinates: 1.09 m of mean translation are 0.90 m of pelvis height.
        rest_pelvis=(-0.0018, -0.1908, 0.0282),
        output="velocity",
        frame_weight=0.0,
        zero_final=False,
    )


FULL = _released(1280, 20, 27)
"""HY-Motion-1.0."""
LITE = _released(1024, 16, 18)
"""HY-Motion-1.0-Lite."""


class HYMotion(nn.Module):
    """Predicts the velocity from noise to clean motion at flow time t (0 = noise, 1 = data).

    The text stream never sees motion. Both are run at the lengths of the longest clip and caption of the batch: padding
    is neither computed nor seen.
    """

    def __init__(self, config: HYMotionConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, hidden = config.width, config.heads, config.width * config.mlp_ratio
        self.null_vtxt_feat = nn.Parameter(0.02 * torch.randn(1, 1, config.pooled_dim))
        self.null_ctxt_input = nn.Parameter(0.02 * torch.randn(1, 1, config.token_dim))
        self.input_encoder = nn.Linear(config.features, width)
        self.ctxt_encoder = nn.Linear(config.token_dim, width)
        self.vtxt_encoder = Projection(config.pooled_dim, width)
        self.timestep_encoder = TimeEncoder(width, factor=1000.0)
        self.text_refiner = TextRefiner(width, heads, hidden, config.refiner_blocks)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, heads, hidden) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(width, heads, hidden) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(width, config.features)
        if config.zero_final:
            nn.init.zeros_(self.final_layer.linear.weight)
            nn.init.zeros_(self.final_layer.linear.bias)

    def forward(
        self,
        x_BTD: Tensor,
        t_B: Tensor,
        tokens_BLC: Tensor,
        mask_BL: Tensor,
        pooled_BC: Tensor,
        keep_B: Tensor,
        lengths_B: Tensor,
    ) -> Tensor:
        """Return the velocity (B, T, D), zero from the longest clip's end on and arbitrary beyond each length.

        Args:
            x_BTD: state at time t, normalised.
            t_B: flow time in [0, 1].
            tokens_BLC: text tokens.
            mask_BL: bool, valid text tokens; the empty caption keeps the mask of the caption it replaces.
            pooled_BC: sentence vectors.
            keep_B: bool, False replaces tokens and sentence vector by the learned empty caption.
            lengths_B: int64 valid model frames, at most `config.train_frames`.
        """
        dtype, total = self.input_encoder.weight.dtype, x_BTD.shape[1]
        frames = int(lengths_B.max())
        words = max(1, int((mask_BL.any(0) * torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device)).max()))
        tokens, mask_BL, keep = tokens_BLC[:, :words].to(dtype), mask_BL[:, :words], keep_B[:, None, None]
        tokens = torch.where(keep, tokens, self.null_ctxt_input)
        pooled = torch.where(keep, self.config.pooled_gain * pooled_BC[:, None].to(dtype), self.null_vtxt_feat)

        condition = self.timestep_encoder(t_B)[:, None] + self.vtxt_encoder(pooled)
        text = self._run(self.text_refiner, self.ctxt_encoder(tokens), t_B, mask_BL)
        motion = self.input_encoder(x_BTD[:, :frames].to(dtype))
        mask, table = self._mask(frames, lengths_B, mask_BL), self._positions(frames, words, x_BTD.device)
        for block in self.double_blocks:
            motion, text = self._run(block, motion, text, condition, mask, table)
        both = torch.cat([motion, text], dim=1)
        for block in self.single_blocks:
            both = self._run(block, both, condition, mask, table)
        out = self.final_layer(both[:, :frames], condition)
        if self.config.output == "clean":
            out = (out - x_BTD[:, :frames]) / flow_remaining(out, t_B)
        return pad(out, (0, 0, 0, total - frames))

    def _mask(self, frames: int, lengths_B: Tensor, mask_BL: Tensor) -> Tensor:
        """Return who sees whom, (B, 1, N, N): frames their neighbours and the text, text itself only."""
        words, place = mask_BL.shape[1], torch.arange(frames, device=mask_BL.device)
        near = (place[:, None] - place[None]).abs() <= self.config.band_frames
        seen = pad(near, (0, words, 0, 0), value=True)
        seen = torch.cat([seen, pad(seen.new_ones(words, words), (frames, 0), value=False)])
        keys_BN = torch.cat([valid_mask(lengths_B, frames), mask_BL], dim=1)
        return with_self(seen & keys_BN[:, None, None, :])

    def _positions(self, frames: int, words: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # Text stands where it stood in training, behind motions of full length.
        start = self.config.train_frames
        places = torch.cat([torch.arange(frames, device=device), start + torch.arange(words, device=device)])
        return rotary_table(places, self.config.width // self.config.heads, self.input_encoder.weight.dtype)

    def _run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        if self.config.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)
