"""`prepare`: any source -> a dataset folder. Read, validate, canonicalise, represent, captions, statistics, report.

The unit of work is a fixed group of ids and the driver writes in id order, so the bytes never depend on how many
workers there are. Stages stream: memory holds a few groups, never the dataset.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.captions import BATCH, CaptionEncoder, TextCache, caption_batches, write_text
from data_prep.execute import clip_tables, require_ray, text_tables
from data_prep.quality import QualityLog
from data_prep.rows import GROUP, ROW_SCHEMA
from data_prep.sources import build_source
from data_prep.sources.base import Rejected, Source
from data_prep.stats import TrainStatistics, save_statistics
from data_prep.writer import SplitWriter
from motionrft.config.prepare import PrepareConfig
from motionrft.core.errors import DataError, explain
from motionrft.data.manifest import (
    MANIFEST,
    UNFINISHED,
    AddedText,
    Dataset,
    Manifest,
    SplitCounts,
    file_entry,
    text_file,
)
from motionrft.data.schema import CLIP_SCHEMA, SCHEMA_VERSION, SPLITS
from motionrft.data.tables import TextTable

_LOG = logging.getLogger(__name__)
_CHOSEN = ("TOO_SHORT", "TOO_LONG", "NO_ROTATIONS")  # left out by the config, not broken
_OURS = ("clips", "stats", "text", "quality.parquet", "quality.txt", MANIFEST)

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did."""

    root: Path
    read: int
    clips: Mapping[str, int]  # per split, mirrored copies included
    frames: Mapping[str, int]
    rejected: Mapping[str, int]  # code -> clips
    flagged: Mapping[str, int]  # code -> clips
    captions: int  # unique
    classes: tuple[str, ...]
    seconds: Mapping[str, float]  # stage -> wall time
    fingerprint: str  # of the manifest
    summary: str  # the text of quality.txt


def prepare(config: PrepareConfig, progress: Progress | None = None, source: Source | None = None) -> PrepareReport:
    """Write the dataset `config.out` and return what happened.

    With `config.workers > 0` Ray must be connected; with 0 nothing of Ray is used and the bytes are the same.

    Args:
        config: every choice.
        progress: told about finished work.
        source: where clips come from; default: the one the config names.

    Raises:
        DataError: the source cannot be used at all, the target holds something else, too many clips are unusable, or
            the training split is empty.
        ClusterError: workers without a Ray connection.
    """
    if config.workers:
        require_ray()
    tell = progress or (lambda stage, done, total: None)
    source = build_source(config) if source is None else source
    ids = source.ids()
    ids = ids[: config.limit] if config.limit else ids
    if not ids:
        raise DataError(explain("clips", "none", f"source {source.name!r}", "Check the path and its format."))
    if len(set(ids)) != len(ids):
        raise DataError(explain("unique clip ids", "duplicates", f"source {source.name!r}", "Rename the clips."))
    encoder = CaptionEncoder(config.text_encoder)  # before any work: a missing package must not cost an hour
    root = _claim(Path(config.out), config.overwrite)
    started = time.monotonic()
    intake = _Intake(root, config)
    for problem in source.known_problems():
        intake.quality.reject(problem, "source")
    for table in clip_tables(source, ids, config):
        intake.add(table)
        tell("clips", intake.quality.read, len(ids))
    intake.close()
    clips_done = time.monotonic()
    quality_rows = intake.quality.write(root)
    _check(intake, len(ids), config, root)
    normalizers = intake.statistics.normalizers({"source": source.name, "variant": config.variant, "fps": config.fps})
    save_statistics(root, normalizers)
    text_rows = _write_text(root, intake.captions, encoder, config.text_cache, config.workers, tell)
    text_done = time.monotonic()

    files = {path.relative_to(root).as_posix(): file_entry(path, rows) for path, rows in intake.files().items()}
    files |= {f"stats/{r.value}.npz": file_entry(root / "stats" / f"{r.value}.npz") for r in normalizers}
    files |= {name: file_entry(root / name, rows) for name, rows in text_rows.items()}
    files["quality.parquet"] = file_entry(root / "quality.parquet", quality_rows)
    files["quality.txt"] = file_entry(root / "quality.txt")
    quality = intake.quality
    manifest = Manifest(
        schema=SCHEMA_VERSION,
        source=source.name,
        fps=config.fps,
        variant=config.variant,
        splits={name: SplitCounts(w.clips, w.frames, w.captions) for name, w in intake.writers.items()},
        classes=tuple(intake.classes),
        text_encoder=encoder.card.fingerprint,
        text_encoder_name=Path(encoder.card.name).name,
        text_dim=encoder.card.dim,
        options=config.options(),
        quality={
            "read": quality.read,
            "clips": quality.clips,
            "rejected": quality.count("rejected"),
            **quality.codes("rejected", "source"),
        },
        stats={r.value: n.fingerprint for r, n in normalizers.items()},
        code_version=metadata.version("motionrft"),
        files=dict(sorted(files.items())),
    )
    manifest.write(root)
    return PrepareReport(
        root=root,
        read=quality.read,
        clips={name: w.clips for name, w in intake.writers.items()},
        frames={name: w.frames for name, w in intake.writers.items()},
        rejected=quality.codes("rejected"),
        flagged=quality.codes("flagged"),
        captions=sum(text_rows.values()),
        classes=manifest.classes,
        seconds={
            "clips": clips_done - started,
            "text": text_done - clips_done,
            "total": time.monotonic() - started,
        },
        fingerprint=manifest.fingerprint,
        summary=quality.summary(),
    )


class _Intake:
    """Takes row tables in id order: splits them, numbers classes, writes, and keeps the books."""

    def __init__(self, root: Path, config: PrepareConfig) -> None:
        self.statistics = TrainStatistics()
        self.quality = QualityLog()
        self.classes: dict[str, int] = {}
        self.captions: set[str] = set()
        self.writers = {
            split: SplitWriter(
                root,
                split,
                config.clips_per_shard,
                self.statistics.add if split == "train" else lambda group: None,
            )
            for split in SPLITS
        }

    def add(self, table: pa.Table) -> None:
        table = table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)
        book = table.select(["item_id", "split", "source", "mirrored", "qc_flags", "code", "detail", "class_name"])
        for row in book.to_pylist():
            if row["code"]:
                rejected = Rejected(*(row[k] for k in ("item_id", "split", "source", "code", "detail")))
                self.quality.reject(rejected, "mirror" if row["mirrored"] else "rejected")
            else:
                self.quality.flag(row["item_id"], row["split"], row["source"], row["qc_flags"])
                if row["class_name"]:
                    self.classes.setdefault(row["class_name"], len(self.classes))
            if not row["mirrored"]:
                self.quality.read += 1
                self.quality.clips += not row["code"]
        good = table.filter(pc.equal(table["code"], "")).select(CLIP_SCHEMA.names)
        class_ids = [self.classes.get(name, -1) for name in good["class_name"].to_pylist()]
        position = CLIP_SCHEMA.get_field_index("class_id")
        good = good.set_column(position, CLIP_SCHEMA.field(position), pa.array(class_ids, pa.int32()))
        self.captions.update(c for row in good["captions"].to_pylist() for c in row)
        for split, writer in self.writers.items():
            part = good.filter(pc.equal(good["split"], split))
            if len(part):
                writer.add(part)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def files(self) -> dict[Path, int]:
        return {path: rows for writer in self.writers.values() for path, rows in writer.files.items()}


def _check(intake: _Intake, num_ids: int, config: PrepareConfig, root: Path) -> None:
    """Raise DataError if the result is not worth keeping; quality files are written already."""
    quality = intake.quality
    rejected, missing = quality.count("rejected"), quality.missing()
    if quality.read != num_ids or quality.clips + rejected != num_ids:
        raise DataError(
            explain(
                f"{num_ids} ids accounted for",
                f"{quality.clips} clips + {rejected} rejected",
                "prepare",
                "This is a defect of a source or of the pipeline: report it.",
            )
        )
    unusable = rejected - sum(quality.codes("rejected").get(code, 0) for code in _CHOSEN)
    share = (unusable + missing) / (num_ids + missing)
    if share > config.max_reject_frac:
        top = ", ".join(f"{n} {code}" for code, n in list(quality.codes("rejected", "source").items())[:4])
        raise DataError(
            explain(
                f"at most {config.max_reject_frac:.1%} unusable clips",
                f"{share:.1%} of {num_ids + missing} ({top})",
                str(root / "quality.txt"),
                "Read that file, mend the source, or raise max_reject_frac.",
            )
        )
    if not intake.writers["train"].clips:
        raise DataError(
            explain(
                "clips in the training split",
                f"{ {s: w.clips for s, w in intake.writers.items()} }",
                str(root),
                "Statistics come from training clips only: check the split files or fractions.",
            )
        )


def add_text(root: Path, name: str, cache: str = "", workers: int = 0, progress: Progress | None = None) -> AddedText:
    """Encode a finished dataset's captions with a further encoder and keep the features beside its own.

    A generator reads the features its weights were trained with, the reward those of the dataset.

    Args:
        root: dataset folder.
        name: of the encoder, as `nn.text.load_text_encoder` takes it.
        cache: folder of features shared by datasets; "" = none.
        workers: Ray actors; 0 = this process.
        progress: told about finished work.

    Raises:
        DataError: no dataset, or these features are there already.
    """
    if workers:
        require_ray()
    dataset = Dataset.open(root)
    encoder = CaptionEncoder(name)
    mark = encoder.card.fingerprint
    if mark == dataset.manifest.text_encoder or mark in dataset.added_texts():
        raise DataError(explain("an encoder the dataset does not have", f"{name} ({mark[:12]})", str(root), "Use it."))
    captions = set(TextTable.open(dataset).captions)
    rows = _write_text(root, captions, encoder, cache, workers, progress or (lambda stage, done, total: None))
    file, count = next(iter(rows.items()))
    added = AddedText(name, mark, file_entry(root / file, count))
    added.write(root)
    return added


def _write_text(
    root: Path, captions: set[str], encoder: CaptionEncoder, folder: str, workers: int, tell: Progress
) -> dict[str, int]:
    """Encode what the cache in `folder` does not have; write all; return relative path -> rows."""
    wanted = [c for batch in caption_batches(captions) for c in batch]
    cache = TextCache(folder, encoder.card.fingerprint)
    missing = cache.missing(wanted)
    batches = [missing[i : i + BATCH] for i in range(0, len(missing), BATCH)]
    tables = []
    for table in text_tables(batches, encoder, workers):
        tables.append(table)
        tell("captions", sum(map(len, tables)), len(missing))
    cache.add(tables)
    name = text_file(encoder.card.fingerprint)
    write_text(root / name, cache.take(wanted))
    _LOG.info("%d captions, %d of them encoded now", len(wanted), len(missing))
    return {name: len(wanted)}


def _claim(root: Path, overwrite: bool) -> Path:
    """Return an empty folder marked unfinished.

    Only files this pipeline writes are ever removed, and only where it has written before.
    """
    if root.exists() and not root.is_dir():
        raise DataError(explain("a folder to write to", "a file", str(root), "Choose another `out`."))
    if root.is_dir() and any(root.iterdir()):
        finished, unfinished = (root / MANIFEST).is_file(), (root / UNFINISHED).exists()
        if not finished and not unfinished:
            raise DataError(explain("an empty or new folder", "other files in it", str(root), "Choose another `out`."))
        if finished and not unfinished and not overwrite:
            raise DataError(
                explain(
                    "a folder without a dataset",
                    "a finished one",
                    str(root),
                    "Choose another `out`, or set overwrite to replace it.",
                )
            )
    root.mkdir(parents=True, exist_ok=True)
    (root / UNFINISHED).touch()
    for name in _OURS:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return root


__all__ = ["GROUP", "PrepareReport", "Progress", "prepare"]
