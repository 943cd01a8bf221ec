"""Per-representation projections into the shared width: the only part of the tower that knows the representation."""

from __future__ import annotations

import itertools

from torch import nn

from motionrft.nn.dropout import Dropout


class Projection(nn.Sequential):
    """Linear, then (GELU, dropout, Linear) up to `num_layers` linear layers; children 0, 3, 6 are the linear ones."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, num_layers: int, dropout: float) -> None:
        widths = [in_dim, *([hidden] * (num_layers - 1)), out_dim]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for before, after in itertools.pairwise(widths[1:]):
            layers += [nn.GELU(), Dropout(dropout), nn.Linear(before, after)]
        super().__init__(*layers)
