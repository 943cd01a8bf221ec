"""The bank of self-refinement: every training motion embedded, and the best-ranked wrong one of every caption.

Encoding and exact search are shared out over the workers, whatever their number; all of them hold the whole result.
Letters: N clips, Q queries (clip, caption), C distinct captions, P captions of a clip, d latent, E sentence features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from motionrft.core.errors import CheckpointError
from motionrft.core.protocols import Runtime
from motionrft.core.types import Representation
from motionrft.reward.backbone import RewardBackbone
from motionrft.reward.losses import hard_negatives
from motionrft.reward.objectives import LoserMotions, Losers, SplConfig
from motionrft.reward.terms import MotionScale
from motionrft.training.recipes.common import Split

_CHUNK = 128


class LoserBank:
    """`Stateful` table of hard negatives, one per representation and (clip, caption) of the training split.

    A motion is no wrong answer to a caption if it is another view of the same clip, has the same known class, or one
    of its own captions is closer to the query than the false-negative threshold.

    Args:
        split: training clips and the features of their captions.
        normalizers: of the representations to mine in.
        spl: k of the top-k.
        threshold: false-negative threshold, as in stage 1.
        same_class_is_negative: as in stage 1.
        max_frames: clips are embedded from their first frame to at most here.
        runtime: shares out the work.
    """

    def __init__(
        self,
        split: Split,
        normalizers: Mapping[Representation, MotionScale],
        spl: SplConfig,
        threshold: float,
        same_class_is_negative: bool,
        max_frames: int,
        runtime: Runtime,
    ) -> None:
        self.split, self.normalizers, self.spl, self.runtime = split, normalizers, spl, runtime
        self.threshold, self.max_frames = threshold, max_frames
        counts = [len(c) for c in split.clips.captions]
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.query_rows = np.repeat(np.arange(len(counts)), counts)
        captions = [c for own in split.clips.captions for c in own]
        self.distinct = list(dict.fromkeys(captions))
        place = {c: i for i, c in enumerate(self.distinct)}
        self.query_captions = np.array([place[c] for c in captions], dtype=np.int64)
        widest = max([*counts, 1])
        # (N, P) captions of each clip; -1 where it has fewer
        self.clip_captions = np.full((len(counts), widest), -1, dtype=np.int64)
        for row, (start, count) in enumerate(zip(self.offsets, counts)):
            self.clip_captions[row, :count] = self.query_captions[start : start + count]
        _, self.recordings = np.unique(np.array(split.clips.clip_ids), return_inverse=True)
        classes = split.clips.class_ids.numpy()
        self.classes = np.full_like(classes, -1) if same_class_is_negative else classes
        self.table = {r.value: torch.full((len(captions),), -1, dtype=torch.int64) for r in normalizers}

    @torch.no_grad()
    def mine(self, backbone: RewardBackbone) -> dict[str, float]:
        """Embed and search with the weights of now; return representation -> share of wrong retrievals. Collective."""
        training = backbone.training
        backbone.eval()
        text_Cd = self._embed_captions(backbone)
        found = {}
        for representation in self.normalizers:
            motion_Nd = self._embed_clips(backbone, representation)
            column_Q = self._shared(len(self.query_rows), partial(self._search, text_Cd=text_Cd, motion_Nd=motion_Nd))
            self.table[representation.value] = column_Q.cpu()
            found[representation.value] = float((column_Q >= 0).float().mean())
        backbone.train(training)
        return found

    def losers(self, rows: Sequence[int], caption_choice: Sequence[int], device: torch.device) -> Losers:
        """Return the hard negatives of training rows with these captions, per representation."""
        found = {}
        queries = [int(self.offsets[r]) + c for r, c in zip(rows, caption_choice, strict=True)]
        known = [bool(self.offsets[r + 1] > self.offsets[r]) for r in rows]
        for name, table_Q in self.table.items():
            columns = [int(table_Q[q]) if has else -1 for q, has in zip(queries, known, strict=True)]
            chosen = [i for i, column in enumerate(columns) if column >= 0]
            kind = Representation(name)
            if not chosen:
                empty = torch.zeros(0, dtype=torch.int64, device=device)
                found[name] = LoserMotions(empty, torch.zeros(0, 1, kind.dim, device=device), empty, empty)
                continue
            batch = self.split.batch([columns[i] for i in chosen], [kind], self.max_frames).to(device)
            place = torch.tensor(chosen, device=device)
            found[name] = LoserMotions(place, batch.motions[kind], batch.lengths_B, batch.keys_B)
        return found

    def export_state(self) -> dict[str, Tensor]:
        """Return the table: a run that continues between two minings goes on with the same losers."""
        return {name: t.clone() for name, t in self.table.items()}

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the table.

        Raises:
            CheckpointError: it is of another dataset.
        """
        for name, own in self.table.items():
            if name not in state or state[name].shape != own.shape:
                raise CheckpointError("the checkpoint's table of hard negatives belongs to another dataset")
            self.table[name] = state[name].clone()

    def _embed_captions(self, backbone: RewardBackbone) -> Tensor:
        device = self.runtime.device

        def embed(rows: np.ndarray) -> Tensor:
            text = self.split.text.condition([self.distinct[i] for i in rows]).to(device)
            return normalize(backbone.text(text.tokens_BLD, text.mask_BL)[0].float(), dim=-1)

        return self._shared(len(self.distinct), embed)

    def _embed_clips(self, backbone: RewardBackbone, representation: Representation) -> Tensor:
        device, scale = self.runtime.device, self.normalizers[representation]

        def embed(rows: np.ndarray) -> Tensor:
            batch = self.split.batch(rows.tolist(), [representation], self.max_frames).to(device)
            x = torch.where(batch.mask_BT[..., None], scale.normalise(batch.motions[representation]), 0.0)
            mu, _ = backbone.motion(x, batch.lengths_B, representation.value, torch.tensor(0, device=device))
            return normalize(mu.float(), dim=-1)

        return self._shared(len(self.split.clips), embed)

    def _search(self, queries: np.ndarray, text_Cd: Tensor, motion_Nd: Tensor) -> Tensor:
        rows, captions = self.query_rows[queries], self.query_captions[queries]
        sims = text_Cd[torch.from_numpy(captions).to(text_Cd.device)] @ motion_Nd.T
        own = torch.from_numpy(rows).to(sims.device)
        return hard_negatives(sims, own, self._not_wrong(rows, captions).to(sims.device), self.spl.k)

    def _not_wrong(self, rows: np.ndarray, captions: np.ndarray) -> Tensor:
        """Return the (q, N) bool mask of motions that are not wrong answers to these queries."""
        same = self.recordings[rows][:, None] == self.recordings[None]
        classes = self.classes[rows]
        same |= (classes[:, None] == self.classes[None]) & (classes >= 0)[:, None]
        pooled_CE = self._pooled()
        close_qC = (pooled_CE[captions] @ pooled_CE.T) > 2.0 * self.threshold - 1.0
        for column in self.clip_captions.T:
            same |= close_qC[:, column] & (column >= 0)
        return torch.from_numpy(same)

    def _pooled(self) -> np.ndarray:
        if not hasattr(self, "_pooled_CE"):
            # in chunks: the tokens that come along would fill the memory on a large dataset
            chunks = [self.distinct[i : i + _CHUNK] for i in range(0, len(self.distinct), _CHUNK)]
            pooled = torch.cat([self.split.text.condition(chunk).pooled_BD for chunk in chunks])
            self._pooled_CE = normalize(pooled, dim=-1).numpy()
        return self._pooled_CE

    def _shared(self, count: int, work: Callable[[np.ndarray], Tensor]) -> Tensor:
        """Return work(rows) for all rows 0..count-1, each rank doing an equal share. Collective."""
        runtime = self.runtime
        size = -(-count // runtime.world)  # equal shares: the last rank repeats the final row
        shares = [np.minimum(np.arange(r * size, (r + 1) * size), count - 1) for r in range(runtime.world)]
        mine = shares[runtime.rank]
        parts = [work(mine[i : i + _CHUNK]) for i in range(0, size, _CHUNK)]
        return runtime.gather(torch.cat(parts))[:count]
