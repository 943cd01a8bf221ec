"""BVH clips from folders and tar archives; joint names, units, rest axes and captions come from a YAML mapping.

Letters: T frames, J = 22 joints.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import roma
import torch
import yaml
from torch import Tensor

from data_prep.sources.base import SPLITS, Rejected, SourceClip
from data_prep.sources.bvh_format import BvhClip, parse_bvh
from motionrft.core.errors import DataError, explain
from motionrft.representations.rotations import shortest_rotation
from motionrft.representations.skeleton import T2M

_BUNDLED = "bandai_namco.yaml"
_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tar.bz2", ".tgz", ".txz")
_UP = {"y": np.eye(3), "z": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])}  # (x, y, z) -> (x, z, -y)
_AXIS = {f"{sign}{axis}": s * np.eye(3)[i] for sign, s in (("+", 1), ("-", -1)) for i, axis in enumerate("xyz")}


@dataclass(frozen=True)
class BvhMapping:
    """How one family of BVH files becomes SMPL joints and captions; fields are documented in the bundled YAML."""

    name: str
    unit_m: float
    joints: Mapping[str, str | list[str]]
    up: str = "y"
    rotations: Mapping[str, list[str]] = field(default_factory=dict)  # empty: rotations are fitted later
    file_name: str = ""
    contents: Mapping[str, list[str]] = field(default_factory=dict)
    styles: Mapping[str, list[str]] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every joint is mapped and every value is of its kind."""
        problems = []
        names = set(T2M.joint_names)
        if set(self.joints) != names:
            problems.append(f"joints must name exactly the 22 SMPL joints; wrong: {sorted(set(self.joints) ^ names)}")
        if self.rotations and set(self.rotations) != names:
            problems.append(f"rotations must name all 22 joints or none; wrong: {sorted(set(self.rotations) ^ names)}")
        for joint, entry in self.rotations.items():
            if len(entry) != 4 or any(a not in _AXIS for a in entry[1:]):
                problems.append(f"rotations.{joint} must be [BVH joint, left, up, front] with axes such as +x")
            elif np.linalg.det(np.stack([_AXIS[a] for a in entry[1:]])) < 0.5:
                problems.append(f"rotations.{joint}: {entry[1:]} are not three axes of a right-handed frame")
        if self.up not in _UP:
            problems.append(f"up must be y or z, got {self.up!r}")
        if not self.unit_m > 0:
            problems.append(f"unit_m must be > 0, got {self.unit_m}")
        for name, table in (("contents", self.contents), ("styles", self.styles)):
            bad = [k for k, v in table.items() if not isinstance(v, list) or len(v) < 2]
            if bad:
                problems.append(f"{name}.{bad[0]} must be [class, phrase, further phrases...]")
        if set(self.splits) - set(SPLITS):
            problems.append(f"splits must be among {', '.join(SPLITS)}")
        if problems:
            raise DataError(
                explain("a complete BVH mapping", "; ".join(problems), f"mapping {self.name!r}", "Edit the YAML file.")
            )

    def describe(self, stem: str) -> tuple[tuple[str, ...], str]:
        """Return (captions, class name) of a file name; nothing where the mapping does not know it."""
        match = re.fullmatch(self.file_name, stem) if self.file_name else None
        if match is None:
            return (), ""
        groups = match.groupdict()
        content, style = self.contents.get(groups.get("content", "")), groups.get("style", "")
        if content is None or style not in self.styles:
            return (), ""
        class_name, *actions = content
        style_name, *manners = self.styles[style]
        captions = []
        for template, action, manner in itertools.product(self.captions, actions, manners):
            text = template.format(content=action, style=manner)
            captions.append(re.sub(r"\s+([.,])", r"\1", " ".join(text.split())))
        return tuple(dict.fromkeys(captions)), f"{class_name}|{style_name}"


def load_mapping(path: str = "") -> BvhMapping:
    """Read a mapping; "" = the bundled one.

    Raises:
        DataError: no such file, no YAML, unknown or missing fields.
    """
    try:
        if path:
            text = Path(path).read_text()
        else:
            text = resources.files("data_prep").joinpath("assets", _BUNDLED).read_text()
        values: Any = yaml.safe_load(text)
        known = {f.name for f in fields(BvhMapping)}
        if not isinstance(values, dict) or set(values) - known:
            raise ValueError(f"unknown fields {sorted(set(values) - known)}" if isinstance(values, dict) else "no map")
        return BvhMapping(**{**values, "captions": tuple(values.get("captions") or ())})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise DataError(
            explain("a BVH mapping in YAML", str(error), path or _BUNDLED, "Start from data_prep/assets.")
        ) from error


class BvhSource:
    """All *.bvh below a folder or inside tar archives; the id is the path without suffix.

    Args:
        path: folder (archives in it are read too), archive, or one file.
        mapping: joints, units, captions.
        val_frac: share of clips in val, by a hash of the file, where the mapping names no split.
        test_frac: the same for test.

    Raises:
        DataError: the path does not exist.
    """

    def __init__(self, path: str, mapping: BvhMapping, val_frac: float = 0.1, test_frac: float = 0.1) -> None:
        self.name = mapping.name
        self._path, self._mapping = Path(path).resolve(), mapping
        self._val, self._test = val_frac, test_frac
        if not self._path.exists():
            raise DataError(explain("a BVH folder or archive", "no such path", str(path), "Correct the path."))

    def ids(self) -> list[str]:
        """Return all clip ids, sorted."""
        found = sorted(_index(str(self._path)))
        if not found:
            raise DataError(
                explain("*.bvh files", "none", str(self._path), "Give the folder or the .tar.xz that holds them.")
            )
        return found

    def known_problems(self) -> list[Rejected]:
        """Return nothing: there are no lists that files could be missing from."""
        return []

    def read(self, clip_id: str) -> SourceClip | Rejected:
        """Return one clip, or why it is no usable BVH."""
        data = _bytes(str(self._path), clip_id)
        split = self._split(clip_id, data)
        try:
            clip = parse_bvh(data)
            joints = _joints(clip, self._mapping)
            rotations = _rotations(clip, self._mapping) if self._mapping.rotations else None
        except DataError as error:
            code = "TRUNCATED" if "truncated" in str(error) or "cut" in str(error) else "BAD_BVH"
            return Rejected(clip_id, split, self.name, code, str(error))
        captions, class_name = self._mapping.describe(clip_id.rsplit("/", 1)[-1])
        return SourceClip(
            clip_id=clip_id,
            split=split,
            joints_TJ3=joints.astype(np.float32),
            fps=clip.fps,
            captions=captions,
            class_name=class_name,
            source=self.name,
            rotations_TJ33=None if rotations is None else rotations.astype(np.float32),
            rot_source="" if rotations is None else "bvh",
        )

    def _split(self, clip_id: str, data: bytes) -> str:
        for split, pattern in self._mapping.splits.items():
            if re.search(pattern, clip_id):
                return split
        place = int.from_bytes(hashlib.sha256(data).digest()[:8], "little") / 2**64
        return "test" if place < self._test else "val" if place < self._test + self._val else "train"


def _joints(clip: BvhClip, mapping: BvhMapping) -> np.ndarray:
    """Return (T, 22, 3) metres, Y up."""
    columns = []
    for name in T2M.joint_names:
        sources = mapping.joints[name]
        rows = [clip.joint(s) for s in ([sources] if isinstance(sources, str) else sources)]
        columns.append(clip.positions_TN3[:, rows].mean(1))
    return np.stack(columns, axis=1) * mapping.unit_m @ _UP[mapping.up].T


def _rotations(clip: BvhClip, mapping: BvhMapping) -> np.ndarray | None:
    """Return local SMPL rotations (T, 22, 3, 3): world rotation times a constant change of rest frame per joint.

    The constant maps the rest offset of the standard body onto the file's own bone, as seen from the BVH joint, with
    the twist that the mapping's axes fix; a bone's direction is then exact and its twist is the recorded one.
    """
    if len(clip.positions_TN3) == 0:
        return None
    up = _UP[mapping.up]
    joints = torch.from_numpy(_joints(clip, mapping))
    offsets = T2M.standard_offsets()
    world = []
    for joint, name in enumerate(T2M.joint_names):
        source, *axes = mapping.rotations[name]
        own = torch.from_numpy(up @ clip.rotations_TN33[:, clip.joint(source)])
        rest = torch.from_numpy(np.stack([_AXIS[a] for a in axes], axis=1))
        world.append(own @ _aligned(rest, own, joints, joint, offsets))
    world_TJ33 = torch.stack(world, dim=1)
    above = world_TJ33[:, list(T2M.parents[1:])]
    return torch.cat([world_TJ33[:, :1], above.transpose(-1, -2) @ world_TJ33[:, 1:]], dim=1).numpy()


def _aligned(rest: Tensor, own: Tensor, joints: Tensor, joint: int, offsets: Tensor) -> Tensor:
    children = list(T2M.children[joint])
    if not children:
        return rest
    bones = (joints[:, children] - joints[:, joint, None]) @ own  # own^T bone, as rows: constant over time
    local = bones.mean(0)
    if len(children) == 1:
        return shortest_rotation(rest @ offsets[children[0]], local[0]) @ rest
    return roma.special_procrustes(local.T @ offsets[children])


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix().replace("#", "%23")


@lru_cache(maxsize=4)
def _index(path: str) -> dict[str, tuple[str, str]]:
    """Return clip id -> (file, archive member or ""), once per process."""
    root = Path(path)
    if root.is_file():
        files, root = [root], root.parent
    else:
        files = sorted(p for p in root.rglob("*") if p.is_file())
    index: dict[str, tuple[str, str]] = {}
    for file in files:
        if file.suffix.lower() == ".bvh":
            entries = {_relative(file, root): (str(file), "")}
        elif file.name.endswith(_ARCHIVES):
            members = sorted(n for n in _archive(str(file)) if n.lower().endswith(".bvh"))
            entries = {_relative(Path(n), Path()): (str(file), n) for n in members}
        else:
            continue
        twice = sorted(set(entries) & set(index))
        if twice:
            raise DataError(
                explain(
                    "one file per clip id", f"two for {twice[0]!r}", path, "Give the folder or the archive, not both."
                )
            )
        index |= entries
    return index


@lru_cache(maxsize=4)
def _archive(path: str) -> dict[str, bytes]:
    """Return the BVH members of an archive. Read once: a compressed archive has no random access."""
    try:
        with tarfile.open(path) as archive:
            result = {}
            for member in archive:
                file = archive.extractfile(member) if member.isfile() and member.name.lower().endswith(".bvh") else None
                if file is not None:
                    result[member.name] = file.read()
            return result
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(explain("a readable tar archive", str(error), path, "Download it again.")) from error


def _bytes(path: str, clip_id: str) -> bytes:
    file, member = _index(path)[clip_id]
    return _archive(file)[member] if member else Path(file).read_bytes()
