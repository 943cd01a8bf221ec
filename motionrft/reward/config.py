"""What a MotionReward model is made of: sizes of towers and adapters, and the published presets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from motionrft.core.errors import ConfigError, explain
from motionrft.core.types import Representation

ALL_REPRESENTATIONS = tuple(r.value for r in Representation)
JOINT_COUNTS = (22, 21)


def check(*rules: tuple[bool, str], where: str) -> None:
    """Raise one ConfigError that lists every rule whose first entry is False."""
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise ConfigError(explain("a consistent configuration", "; ".join(broken), where, "Correct these fields."))


@dataclass(frozen=True)
class MotionRewardConfig:
    """Sizes of the motion tower, text tower and decoder. Defaults are the published size."""

    unified_dim: int = 256
    """Width D of the motion encoder."""
    latent_dim: int = 128
    """Width d of latent, text encoder and decoder."""
    num_layers: int = 3
    """Blocks of motion and text encoder; odd."""
    num_heads: int = 4
    """Attention heads of motion encoder and decoder."""
    ff_dim: int = 512
    """Hidden width of every transformer MLP."""
    text_heads: int = 4
    """Attention heads of the text encoder."""
    decoder_layers: int = 3
    """Blocks of the reconstruction decoder; odd."""
    proj_hidden: int = 256
    """Hidden width of the per-representation projections."""
    proj_layers: int = 2
    """Linear layers of each projection."""
    text_token_dim: int = 1024
    """Feature size of the frozen text encoder's tokens."""
    max_positions: int = 500
    """Longest sequence of tokens, class and time token included."""
    frames_per_token: int = 1
    """Consecutive frames stacked into one token: 2 halves the cost, 1 is the paper."""
    dropout: float = 0.1
    """Dropout of towers, decoder and heads. 0 keeps training independent of the worker layout."""
    time_token: str = "always"
    """When the motion tower gets a time token: "always" (clean motion gets t = 0) or "none_when_clean"."""
    text_time: bool = False
    """Give the text tower a time embedding. Released weights hold one that was never trained."""
    max_t: int = 500
    """Diffusion times the tower is trained for are below this; noisier states are labelled max_t - 1."""
    representations: tuple[str, ...] = ALL_REPRESENTATIONS
    """Representations the towers read."""
    num_joints: int = 22
    """Joints of the body: 22 (HumanML3D, SMPL) or 21 (KIT-ML)."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        sizes = ("unified_dim", "latent_dim", "num_heads", "ff_dim", "text_heads", "proj_hidden", "proj_layers")
        check(
            *((getattr(self, n) >= 1, f"{n} must be at least 1") for n in (*sizes, "text_token_dim")),
            (self.num_layers % 2 == 1, "num_layers must be odd"),
            (self.decoder_layers % 2 == 1, "decoder_layers must be odd"),
            (self.unified_dim % max(self.num_heads, 1) == 0, "num_heads must divide unified_dim"),
            (self.latent_dim % max(self.num_heads, 1) == 0, "num_heads must divide latent_dim (decoder)"),
            (self.latent_dim % max(self.text_heads, 1) == 0, "text_heads must divide latent_dim"),
            (self.max_positions >= 3, "max_positions must be at least 3"),
            (self.frames_per_token >= 1, "frames_per_token must be at least 1"),
            (0.0 <= self.dropout < 1.0, "dropout must be in [0, 1)"),
            (self.time_token in ("always", "none_when_clean"), "time_token must be 'always' or 'none_when_clean'"),
            (1 <= self.max_t <= 1000, "max_t must be in [1, 1000]"),
            (len(self.representations) > 0, "representations must not be empty"),
            (
                set(self.representations) <= set(ALL_REPRESENTATIONS)
                and len(set(self.representations)) == len(self.representations),
                f"representations must be distinct names of {ALL_REPRESENTATIONS}",
            ),
            (self.num_joints in JOINT_COUNTS, f"num_joints must be one of {JOINT_COUNTS}"),
            where="reward.model",
        )

    def feature_dim(self, representation: str) -> int:
        """Return features per frame F: 12 J - 1 kinematic, 3 J joint, 3 + 6 J rotation; 263, 66, 135 for 22 joints."""
        joints = self.num_joints
        return {"kinematic": 12 * joints - 1, "joint": 3 * joints, "rotation": 3 + 6 * joints}[str(representation)]


@dataclass(frozen=True)
class AdapterConfig:
    """Size of a low-rank adapter on the frozen motion tower. Its update is scaled by alpha / rank."""

    rank: int = 16
    """Rank r of the update."""
    alpha: float = 32.0
    """Numerator of the scale."""
    dropout: float = 0.1
    """Dropout on the adapter's input while it is trained."""

    def __post_init__(self) -> None:
        """Report every contradiction at once."""
        check(
            (self.rank >= 1, "rank must be at least 1"),
            (self.alpha > 0, "alpha must be positive"),
            (0.0 <= self.dropout < 1.0, "dropout must be in [0, 1)"),
            where="reward.adapter",
        )


def _published(
    unified: int, layers: int, heads: int, ff: int, proj_layers: int, text_heads: int | None = None
) -> MotionRewardConfig:
    return MotionRewardConfig(
        unified_dim=unified,
        latent_dim=unified // 2,
        num_layers=layers,
        decoder_layers=layers,
        num_heads=heads,
        text_heads=text_heads or heads,
        ff_dim=ff,
        proj_hidden=unified,
        proj_layers=proj_layers,
        text_time=True,
    )


PRESETS: dict[str, MotionRewardConfig] = {
    "tiny": _published(256, 3, 4, 512, 2),
    "small": _published(384, 5, 6, 768, 2),
    "base": _published(512, 9, 4, 1024, 3),
    "large": _published(768, 11, 6, 1536, 3),
    "xlarge": _published(1024, 11, 8, 2048, 3),
    "xxlarge": _published(768, 11, 12, 3072, 3, text_heads=6),
    "giant": _published(896, 13, 14, 3584, 3, text_heads=7),
    "quickstart": MotionRewardConfig(
        unified_dim=128,
        latent_dim=64,
        num_layers=3,
        decoder_layers=1,
        num_heads=4,
        text_heads=4,
        ff_dim=256,
        proj_hidden=128,
        proj_layers=2,
        text_token_dim=384,
        max_positions=256,
        frames_per_token=2,
        dropout=0.0,
        max_t=700,
    ),
    "retrieval_original": replace(_published(256, 9, 4, 1024, 1), latent_dim=256, max_positions=500),
}


def reward_preset(name: str, **changes: object) -> MotionRewardConfig:
    """Return the preset `name` with some fields changed.

    Raises:
        ConfigError: for an unknown preset or field.
    """
    if name not in PRESETS:
        raise ConfigError(explain(f"one of {sorted(PRESETS)}", repr(name), "reward preset", "Choose a known preset."))
    unknown = sorted(set(changes) - {f.name for f in fields(MotionRewardConfig)})
    if unknown:
        raise ConfigError(explain("fields of MotionRewardConfig", str(unknown), "reward preset", "Check the names."))
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
