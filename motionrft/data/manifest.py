"""A dataset folder: its manifest, where its files are, and whether they are what was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from motionrft.core.errors import DataError, explain
from motionrft.core.types import Representation
from motionrft.data.schema import SCHEMA_VERSION, SPLITS

MANIFEST = "manifest.json"
UNFINISHED = "_UNFINISHED"
_ADDED = "encoder.json"
_SMALL_BYTES = 1 << 20  # files up to this size are always hashed; larger ones on request, rows carry checksums


@dataclass(frozen=True)
class FileEntry:
    """One file of the dataset."""

    sha256: str
    bytes: int
    rows: int  # 0 for files that are no table


@dataclass(frozen=True)
class SplitCounts:
    """Size of a split."""

    clips: int
    frames: int
    captions: int


@dataclass(frozen=True)
class Manifest:
    """What a dataset says about itself. Holds no time, host or absolute path: same input, same bytes."""

    schema: int
    source: str
    fps: float
    variant: str  # of the kinematic features
    splits: Mapping[str, SplitCounts]
    classes: tuple[str, ...]  # class_id is the index
    text_encoder: str  # fingerprint
    text_encoder_name: str
    text_dim: int  # features per token
    options: Mapping[str, Any]  # every choice of the preparation that shapes the output
    quality: Mapping[str, int]  # read, clips, rejected, then rejected per code
    stats: Mapping[str, str]  # representation -> normaliser fingerprint
    code_version: str
    files: Mapping[str, FileEntry] = field(default_factory=dict)  # relative path -> entry

    @property
    def fingerprint(self) -> str:
        """sha256 over everything in the manifest: names the dataset in checkpoints."""
        return hashlib.sha256(_dump(self).encode()).hexdigest()

    def write(self, root: Path) -> None:
        """Write ROOT/manifest.json atomically and remove the unfinished mark: the folder becomes a dataset."""
        partial = root / f".{MANIFEST}.{os.getpid()}.partial"
        with partial.open("w") as file:
            file.write(_dump(self))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(root / MANIFEST)
        (root / UNFINISHED).unlink(missing_ok=True)

    @classmethod
    def read(cls, root: Path) -> Manifest:
        """Read ROOT/manifest.json.

        Raises:
            DataError: not JSON, fields missing, or a newer schema.
        """
        path = root / MANIFEST
        try:
            data = json.loads(path.read_text())
            schema = data["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                explain(
                    "a dataset manifest", f"{type(error).__name__}: {error}", str(path), "Prepare the dataset again."
                )
            ) from error
        if schema != SCHEMA_VERSION:
            newer = isinstance(schema, int) and schema > SCHEMA_VERSION
            raise DataError(
                explain(
                    f"dataset schema {SCHEMA_VERSION}",
                    f"schema {schema}",
                    str(path),
                    "Update motionrft to read it." if newer else "Prepare the dataset again with this version.",
                )
            )
        try:
            return cls(
                **{
                    **data,
                    "classes": tuple(data["classes"]),
                    "splits": {name: SplitCounts(**counts) for name, counts in data["splits"].items()},
                    "files": {name: FileEntry(**entry) for name, entry in data["files"].items()},
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                explain("a complete manifest", str(error), str(path), "Prepare the dataset again.")
            ) from error


@dataclass(frozen=True)
class AddedText:
    """Features of the captions by an encoder that was added to a finished dataset."""

    name: str
    fingerprint: str
    file: FileEntry

    def write(self, root: Path) -> None:
        """Write the entry beside its file, atomically: from then on it counts."""
        place = (root / text_file(self.fingerprint)).with_name(_ADDED)
        partial = place.with_name(f".{_ADDED}.{os.getpid()}.partial")
        partial.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")
        partial.replace(place)


def text_file(fingerprint: str) -> str:
    """Return where the features of an encoder lie, relative to a dataset folder."""
    return f"text/{fingerprint}/part-00000.parquet"


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: str | Path, verify: bool = False) -> Dataset:
        """Open a folder written by `motionrft prepare`.

        Existence and size of every file are always checked, small files are hashed; motion rows carry checksums that
        are compared when they are read.

        Args:
            root: dataset folder.
            verify: hash the large files too.

        Raises:
            DataError: path missing, no dataset, unfinished, newer schema, or a file that changed.
        """
        root = Path(root)
        do = "Run `motionrft prepare` or correct the path."
        if not root.is_dir():
            got = "a file" if root.exists() else "no such path"
            raise DataError(explain("a dataset folder", got, str(root), do))
        if not (root / MANIFEST).is_file():
            if (root / UNFINISHED).exists():
                raise DataError(
                    explain(
                        "a finished dataset",
                        "an interrupted preparation",
                        str(root),
                        "Run the same `motionrft prepare` again: it starts over in this folder.",
                    )
                )
            raise DataError(explain(f"a folder with {MANIFEST}", "none, so this is no dataset", str(root), do))
        dataset = cls(root, Manifest.read(root))
        dataset.check_files(everything=verify)
        return dataset

    def check_files(self, everything: bool = True) -> None:
        """Compare files with the manifest.

        Raises:
            DataError: a file is missing or differs.
        """
        for name, entry in self.manifest.files.items():
            path = self.root / name
            size = path.stat().st_size if path.is_file() else -1
            wrong = ""
            if size != entry.bytes:
                wrong = "no such file" if size < 0 else f"{size} bytes"
            elif everything or entry.bytes <= _SMALL_BYTES:
                got = sha256_of(path)
                wrong = f"sha256 {got[:12]}" if got != entry.sha256 else ""
            if wrong:
                raise DataError(
                    explain(
                        f"{entry.bytes} bytes with sha256 {entry.sha256[:12]}",
                        wrong,
                        str(path),
                        "The file was changed, cut or removed: copy the dataset again or prepare it again.",
                    )
                )

    def clip_files(self, split: str) -> list[Path]:
        """Return the Parquet files of a split, in order.

        Raises:
            DataError: unknown or empty split.
        """
        if split not in SPLITS:
            raise DataError(explain(f"one of {', '.join(SPLITS)}", repr(split), "split name", "Correct the split."))
        files = sorted(name for name in self.manifest.files if name.startswith(f"clips/split={split}/"))
        if not files:
            sizes = {name: counts.clips for name, counts in self.manifest.splits.items()}
            raise DataError(
                explain(
                    f"clips in split {split!r}",
                    f"none ({sizes})",
                    str(self.root),
                    "Choose another split, or prepare with more data.",
                )
            )
        return [self.root / name for name in files]

    def text_files(self) -> list[Path]:
        """Return the Parquet files of text features, in order."""
        prefix = f"text/{self.manifest.text_encoder}/"
        return [self.root / name for name in sorted(self.manifest.files) if name.startswith(prefix)]

    def added_texts(self) -> dict[str, AddedText]:
        """Return fingerprint -> features of further encoders, which `motionrft prepare --add-text` wrote.

        They are not part of the manifest: a dataset is the same one with and without them.

        Raises:
            DataError: a damaged entry.
        """
        found = {}
        for place in sorted((self.root / "text").glob(f"*/{_ADDED}")):
            try:
                data = json.loads(place.read_text())
                entry = AddedText(data["name"], data["fingerprint"], FileEntry(**data["file"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(
                    explain("features of an added encoder", repr(error), str(place), "Remove its folder; add it again.")
                ) from error
            found[entry.fingerprint] = entry
        return found

    def added_text_file(self, fingerprint: str) -> Path:
        """Return the checked Parquet file of an added encoder.

        Raises:
            DataError: no such encoder was added, or its file changed.
        """
        added = self.added_texts()
        if fingerprint not in added:
            known = [f"{entry.name} ({entry.fingerprint[:12]})" for entry in added.values()]
            own = f"{self.manifest.text_encoder_name} ({self.manifest.text_encoder[:12]})"
            add = "Add them: `motionrft prepare --add-text ENCODER --out DATASET`."
            if len(fingerprint) != 64:  # a released generator, imported without its encoder at hand
                add = (
                    "The generator only names its encoder: import it again with --text-encoder. Then add its features."
                )
            raise DataError(
                explain(
                    f"text features of encoder {fingerprint[:40]}",
                    f"those of {', '.join([own, *known])}",
                    str(self.root),
                    add,
                )
            )
        entry, path = added[fingerprint].file, self.root / text_file(fingerprint)
        if not path.is_file() or path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
            raise DataError(
                explain("the file that was written", "another", str(path), "Remove its folder; add it again.")
            )
        return path

    def stats_file(self, representation: Representation) -> Path:
        """Return the normaliser file of a representation."""
        return stats_file(self.root, representation)


def stats_file(root: Path, representation: Representation) -> Path:
    """Return where the normaliser of a representation lies below a dataset folder."""
    return root / "stats" / f"{Representation(representation).value}.npz"


def file_entry(path: Path, rows: int = 0) -> FileEntry:
    """Return the manifest entry of an existing file."""
    return FileEntry(sha256_of(path), path.stat().st_size, rows)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dump(manifest: Manifest) -> str:
    return json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"
