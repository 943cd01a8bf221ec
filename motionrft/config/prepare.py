"""How a dataset is prepared, as plain data. `data_prep` reads it; nothing here touches files or Ray."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from motionrft.core.errors import ConfigError

SOURCES = ("synthetic", "bvh", "humanml3d")
NEEDS_PATH = ("bvh", "humanml3d")
ROTATIONS = ("ik", "require")
LONG_CLIPS = ("cut", "reject")
VARIANTS = ("compatible", "fixed")
_LAYOUT_FIELDS = ("path", "mapping", "out", "workers", "overwrite", "text_cache", "max_reject_frac")


@dataclass(frozen=True)
class PrepareConfig:
    """Every choice of `motionrft prepare`. Same config and input give the same bytes, whatever `workers`."""

    out: str  # dataset folder to write
    source: str = "synthetic"  # synthetic | bvh | humanml3d
    path: str = ""  # folder or archive of the source; unused by synthetic
    mapping: str = ""  # bvh: YAML with joint map, units and captions; "" = the bundled bandai_namco one
    num_clips: int = 2000  # synthetic: clips to generate
    families: tuple[str, ...] = ()  # synthetic: action families to generate; () = all
    limit: int = 0  # read only the first ids (sorted); 0 = all
    seed: int = 0
    fps: float = 20.0  # HumanML3D's rate; other sources are resampled
    min_frames: int = 24  # feature rows; shorter clips are rejected
    max_frames: int = 196  # feature rows; what happens to longer clips says `long_clips`
    long_clips: str = "cut"  # cut = keep the start | reject
    variant: str = "compatible"  # kinematic features: compatible with released weights | fixed
    rotations: str = "ik"  # clips without rotations: ik = fit them to positions, marked | require = reject
    mirror: bool = False  # add a left-right mirrored copy of every training clip, captions swapped
    mirror_held_out: bool = False  # of every validation and test clip too: more classes, but clips come in pairs
    repair_frames: int = 0  # interpolate up to this many consecutive broken frames (at most 3); 0 = reject
    val_frac: float = 0.1  # bvh: share of clips by hash, where the mapping names no split
    test_frac: float = 0.1
    text_encoder: str = "minilm"  # minilm | stub | FOLDER | KIND:FOLDER | hymotion:...: `nn.text.load_text_encoder`
    text_cache: str = ""  # folder for text features shared by datasets; "" = none
    max_reject_frac: float = 0.05  # above this share of unusable clips the preparation fails
    clips_per_shard: int = 1024
    workers: int = 0  # 0 = in this process; n = Ray Data with at most n tasks at a time
    overwrite: bool = False  # replace an existing dataset

    def __post_init__(self) -> None:
        """Check everything at once.

        Raises:
            ConfigError: listing every problem.
        """
        problems = []
        for name, allowed in (
            ("source", SOURCES),
            ("rotations", ROTATIONS),
            ("long_clips", LONG_CLIPS),
            ("variant", VARIANTS),
        ):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.out:
            problems.append("out must name the folder to write")
        if self.source in NEEDS_PATH and not self.path:
            problems.append(f"source {self.source} needs path")
        if self.source not in NEEDS_PATH and self.path:
            problems.append(f"source {self.source} takes no path, got {self.path!r}")
        if self.families and self.source != "synthetic":
            problems.append("families belongs to source synthetic")
        if self.mapping and self.source != "bvh":
            problems.append("mapping belongs to source bvh")
        if not 1.0 <= self.fps <= 240.0:
            problems.append(f"fps must be in 1..240, got {self.fps}")
        if self.num_clips < 1:
            problems.append(f"num_clips must be >= 1, got {self.num_clips}")
        if self.limit < 0:
            problems.append(f"limit must be >= 0, got {self.limit}")
        if not 1 <= self.min_frames <= self.max_frames:
            problems.append(f"1 <= min_frames <= max_frames is broken: {self.min_frames}, {self.max_frames}")
        if not 0 <= self.repair_frames <= 3:
            problems.append(f"repair_frames must be 0..3, got {self.repair_frames}")
        if self.val_frac < 0 or self.test_frac < 0 or self.val_frac + self.test_frac >= 1:
            problems.append(f"val_frac + test_frac must be in 0..1, got {self.val_frac} + {self.test_frac}")
        if not 0 <= self.max_reject_frac <= 1:
            problems.append(f"max_reject_frac must be in 0..1, got {self.max_reject_frac}")
        if self.mirror_held_out and not self.mirror:
            problems.append("mirror_held_out needs mirror")
        if self.mirror and self.source == "humanml3d":
            problems.append("source humanml3d ships its own mirrored clips (M*): set mirror to false")
        if self.source == "humanml3d" and self.fps != 20.0:
            problems.append(f"source humanml3d has features at 20 fps, which cannot be resampled: fps={self.fps}")
        if self.clips_per_shard < 1:
            problems.append(f"clips_per_shard must be >= 1, got {self.clips_per_shard}")
        if self.workers < 0:
            problems.append(f"workers must be >= 0, got {self.workers}")
        if problems:
            raise ConfigError("prepare: " + "; ".join(problems))

    def options(self) -> dict[str, Any]:
        """Return the choices that shape the output, for the manifest: no place, no worker count."""
        chosen = {k: v for k, v in asdict(self).items() if k not in _LAYOUT_FIELDS}
        kind, colon, places = self.text_encoder.rpartition(":")
        names = ",".join(PurePath(place).name for place in places.split(","))
        return chosen | {"text_encoder": kind + colon + names}  # which one it is says its fingerprint
