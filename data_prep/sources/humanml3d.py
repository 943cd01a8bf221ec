"""The directory format of HumanML3D: released features, joints, caption files and split lists.

Features and joints are taken as released, row by row. A caption of a part of a clip becomes an item of its own,
`ID#LINE`, with that one caption.

Letters: T frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep.sources.base import Rejected, SourceClip
from motionrft.core.errors import DataError, RepresentationError, explain
from motionrft.representations.kinematic import kinematic_to_joints, layout_of
from motionrft.representations.skeleton import T2M

FPS = 20.0
_SPLIT_ORDER = ("test", "val", "train")  # an id in two lists belongs to the first: nothing of a test clip is trained on
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class CaptionLine:
    """One annotation: `caption#tokens#start#end`; (0, 0) = the whole clip."""

    caption: str
    start_s: float
    end_s: float

    @property
    def whole(self) -> bool:
        """True iff it describes the whole clip."""
        return self.start_s == 0.0 and self.end_s == 0.0


def parse_caption_line(line: str) -> CaptionLine:
    """Parse one line; a caption may contain '#'.

    Raises:
        ValueError: what is wrong with it.
    """
    fields = line.rsplit("#", 3)
    if len(fields) != 4:
        raise ValueError(f"{len(fields)} fields separated by #, expected caption#tokens#start#end")
    caption = fields[0].strip()
    if not caption:
        raise ValueError("the caption is empty")
    try:
        start, end = (0.0 if math.isnan(value) else value for value in map(float, fields[2:]))
    except ValueError as error:
        raise ValueError(f"start and end are {fields[2]!r} and {fields[3].strip()!r}, expected seconds") from error
    if (start, end) != (0.0, 0.0) and not 0.0 <= start < end:
        raise ValueError(f"the part {start:g} s to {end:g} s is empty")
    return CaptionLine(caption, start, end)


@dataclass(frozen=True)
class _Item:
    clip: str  # file stem
    split: str
    captions: tuple[str, ...]
    start_s: float = 0.0
    end_s: float = 0.0  # 0 = to the end


class HumanML3DSource:
    """A folder with new_joint_vecs/, new_joints/ (optional), texts/ and train/val/test.txt.

    Reads all caption files once, when created.

    Args:
        path: that folder.

    Raises:
        DataError: the folder, a split list or the features are missing.
    """

    name = "humanml3d"

    def __init__(self, path: str) -> None:
        self._root = Path(path).resolve()
        for name, kind in (("", "folder"), ("new_joint_vecs", "folder"), ("texts", "folder")):
            if not (self._root / name).is_dir():
                raise DataError(
                    explain(f"a {kind} in HumanML3D format", "no such folder", str(self._root / name), "Correct path.")
                )
        self._problems: list[Rejected] = []
        self._items: dict[str, _Item] = {}
        for clip, split in self._splits().items():
            if not self._vectors(clip).is_file():
                self._problem(clip, split, "MISSING_FILE", f"no new_joint_vecs/{clip}.npy")
                continue
            self._add(clip, split)

    def ids(self) -> list[str]:
        """Return clip ids and ids of annotated parts, sorted."""
        return sorted(self._items)

    def known_problems(self) -> list[Rejected]:
        """Return missing files, ids in two lists, and caption lines that do not parse."""
        return list(self._problems)

    def read(self, clip_id: str) -> SourceClip | Rejected:
        """Return one clip or part, or why it cannot be read."""
        item = self._items[clip_id]

        def reject(code: str, detail: str) -> Rejected:
            return Rejected(clip_id, item.split, self.name, code, detail)

        try:
            features = _load(self._vectors(item.clip))
            if features.ndim != 2:
                return reject("WRONG_SHAPE", f"features have shape {features.shape}, expected (T, {T2M.kinematic_dim})")
            layout_of(features.shape[1])
            if features.shape[1] != T2M.kinematic_dim:
                return reject("WRONG_SHAPE", f"{features.shape[1]} features per frame: KIT is not supported here")
            joints_path = self._root / "new_joints" / f"{item.clip}.npy"
            if joints_path.is_file():
                joints = _load(joints_path)
            else:
                joints = kinematic_to_joints(torch.from_numpy(features.astype(np.float32))).numpy()
        except RepresentationError as error:
            return reject("WRONG_SHAPE", str(error))
        except (OSError, ValueError, EOFError) as error:
            return reject("UNREADABLE", str(error))
        if joints.ndim != 3 or len(joints) != len(features):
            return reject("WRONG_SHAPE", f"joints have shape {joints.shape} for {len(features)} feature rows")
        if item.end_s:
            rows = slice(int(item.start_s * FPS), min(int(item.end_s * FPS), len(features)))
            features, joints = features[rows], joints[rows]
        return SourceClip(
            clip_id=clip_id,
            split=item.split,
            joints_TJ3=joints.astype(np.float32),
            fps=FPS,
            captions=item.captions,
            class_name="",
            source=self.name,
            kinematic_TD=features.astype(np.float32),
        )

    def _vectors(self, clip: str) -> Path:
        return self._root / "new_joint_vecs" / f"{clip}.npy"

    def _problem(self, clip_id: str, split: str, code: str, detail: str) -> None:
        self._problems.append(Rejected(clip_id, split, self.name, code, detail))

    def _splits(self) -> dict[str, str]:
        """Return clip -> split, sorted by clip."""
        found: dict[str, str] = {}
        for split in _SPLIT_ORDER:
            path = self._root / f"{split}.txt"
            if not path.is_file():
                raise DataError(
                    explain(
                        f"the list of {split} clips",
                        "no such file",
                        str(path),
                        "Copy train.txt, val.txt and test.txt of the release; splits are never made up.",
                    )
                )
            for clip in dict.fromkeys(path.read_text().split()):
                if clip in found:
                    self._problem(clip, split, "DUPLICATE_ID", f"also in {found[clip]}.txt, where it stays")
                else:
                    found[clip] = split
        return dict(sorted(found.items()))

    def _add(self, clip: str, split: str) -> None:
        whole: list[str] = []
        for number, caption in self._captions(clip, split):
            if caption.whole:
                whole.append(caption.caption)
            else:
                self._items[f"{clip}#{number}"] = _Item(clip, split, (caption.caption,), caption.start_s, caption.end_s)
        self._items[clip] = _Item(clip, split, tuple(whole))

    def _captions(self, clip: str, split: str) -> Sequence[tuple[int, CaptionLine]]:
        path = self._root / "texts" / f"{clip}.txt"
        if not path.is_file():
            self._problem(clip, split, "MISSING_TEXT", f"no texts/{clip}.txt: kept without captions")
            return ()
        result = []
        for number, line in enumerate(path.read_bytes().decode("utf-8", errors="replace").splitlines()):
            if not line.strip():
                continue
            try:
                result.append((number, parse_caption_line(line)))
            except ValueError as error:
                self._problem(f"{clip}#{number}", split, "BAD_CAPTION_LINE", str(error))
            else:
                if "\ufffd" in line:
                    self._problem(f"{clip}#{number}", split, "NOT_UTF8", "unreadable characters were replaced")
        return result


def _load(path: Path) -> np.ndarray:
    """Read an array; pickles and Git LFS pointers are refused with a reason."""
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(f"{path.name} is a Git LFS pointer, not an array: run `git lfs pull`")
    return np.load(path, allow_pickle=False)
