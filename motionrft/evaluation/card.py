"""An evaluator on disk: weights, words, and a card that says what it is and how well it measures.

Numbers of two evaluators must never be compared; the card's `id` is what results carry to keep them apart.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from motionrft.core.errors import CheckpointError, explain
from motionrft.core.types import Representation
from motionrft.evaluation.evaluator import CHANNELS, Evaluator, EvaluatorConfig, describe
from motionrft.evaluation.vocabulary import Vocabulary
from motionrft.representations.kinematic_layout import T2M_LAYOUT
from motionrft.representations.normalize import Normalizer

_SCHEMA = 1
_CODE = "conv-bigru/1"  # changes whenever the same weights would give other embeddings
_CARD, _WEIGHTS, _WORDS = "card.json", "model.safetensors", "vocabulary.json"


@dataclass(frozen=True)
class EvaluatorCard:
    """What identifies an evaluator and what was measured about it."""

    name: str
    id: str  # over weights (which hold the statistics), vocabulary and code version
    config: Mapping[str, Any]
    fps: float
    normalizer: str  # fingerprint of the kinematic statistics
    vocabulary: str  # fingerprint of the words
    num_words: int
    train_items: str  # hash of the item ids it was trained on
    lineage: Sequence[str] = ()  # what it was made from; a reward of the run must not be in it
    real_scores: Mapping[str, float] = field(default_factory=dict)  # of real validation motion
    gates: Mapping[str, Any] = field(default_factory=dict)  # GateReport.to_dict()
    representation: str = Representation.KINEMATIC.value
    channels: int = CHANNELS
    loss: str = "symmetric InfoNCE, same class and same caption masked"
    code: str = _CODE
    schema: int = _SCHEMA


def evaluator_id(evaluator: Evaluator) -> str:
    """Return 16 hex digits over weights, statistics, vocabulary and code version."""
    digest = hashlib.sha256(f"{_CODE}\n{evaluator.vocabulary.fingerprint}\n".encode())
    for name, tensor in sorted(evaluator.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def items_hash(item_ids: Sequence[str]) -> str:
    """Return 16 hex digits over the sorted item ids."""
    return hashlib.sha256("\n".join(sorted(item_ids)).encode()).hexdigest()[:16]


def make_card(
    evaluator: Evaluator,
    name: str,
    fps: float,
    train_item_ids: Sequence[str],
    real_scores: Mapping[str, float] | None = None,
    gates: Mapping[str, Any] | None = None,
    lineage: Sequence[str] = (),
) -> EvaluatorCard:
    """Return the card of a trained evaluator."""
    return EvaluatorCard(
        name=name,
        id=evaluator_id(evaluator),
        config=describe(evaluator.config),
        fps=fps,
        normalizer=evaluator.normalizer_fingerprint,
        vocabulary=evaluator.vocabulary.fingerprint,
        num_words=len(evaluator.vocabulary.words),
        train_items=items_hash(train_item_ids),
        lineage=tuple(lineage),
        real_scores=dict(real_scores or {}),
        gates=dict(gates or {}),
    )


def save_evaluator(folder: Path, evaluator: Evaluator, card: EvaluatorCard) -> None:
    """Write the evaluator; the card comes last, so a folder with a card is complete.

    Raises:
        CheckpointError: the card belongs to other weights.
    """
    if card.id != evaluator_id(evaluator):
        raise CheckpointError(
            explain(
                f"the card of evaluator {evaluator_id(evaluator)}",
                card.id,
                f"saving {folder}",
                "Make the card after the last training step.",
            )
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().to(torch.float32).contiguous() for k, v in evaluator.state_dict().items()}
    partial = folder / f".{_WEIGHTS}.{os.getpid()}.partial"
    save_file(weights, partial)
    partial.replace(folder / _WEIGHTS)
    _write(folder / _WORDS, json.dumps(list(evaluator.vocabulary.words), ensure_ascii=True, indent=0))
    _write(folder / _CARD, json.dumps(asdict(card), indent=2, sort_keys=True))


def load_evaluator(folder: Path) -> tuple[Evaluator, EvaluatorCard]:
    """Return the evaluator in eval mode and its card.

    Raises:
        CheckpointError: missing or damaged files, or files that do not belong together.
    """
    try:
        card = EvaluatorCard(**json.loads((folder / _CARD).read_text(encoding="utf-8")))
        words = tuple(json.loads((folder / _WORDS).read_text(encoding="utf-8")))
        weights = load_file(folder / _WEIGHTS)
        if card.schema != _SCHEMA or card.code != _CODE:
            raise CheckpointError(f"schema {card.schema}, code {card.code}")
        blank = Normalizer(torch.zeros(T2M_LAYOUT.dim), torch.ones(T2M_LAYOUT.dim), Representation.KINEMATIC)
        evaluator = Evaluator(EvaluatorConfig(**card.config), Vocabulary(words), blank)
        evaluator.normalizer_fingerprint = card.normalizer
        evaluator.load_state_dict(weights, strict=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(
            explain(
                f"an evaluator written by this version (schema {_SCHEMA}, {_CODE})",
                f"{type(error).__name__}: {error}",
                str(folder),
                "Train the evaluator again or point to its folder.",
            )
        ) from error
    if evaluator_id(evaluator) != card.id:
        raise CheckpointError(
            explain(f"evaluator {card.id}", evaluator_id(evaluator), str(folder), "Its files were changed or mixed.")
        )
    return evaluator.eval(), card


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
