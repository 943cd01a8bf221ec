"""Released MDM checkpoints: from their tensor names to ours (the same, after documented drops)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from motionrft.core.errors import CheckpointError, explain

_DROPPED = ("clip_model.",)  # a frozen text encoder, under this name whichever it is
_FIXED = ("sequence_pos_encoder.pe", "embed_timestep.sequence_pos_encoder.pe")  # sinusoid tables of varying length


def from_upstream(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `network` from a released file's tensors (the mapping itself, not its container).

    Raises:
        CheckpointError: tensors missing, unknown or of another shape; the message lists the first of each.
    """
    kept = {name: t for name, t in tensors.items() if name not in _FIXED and not name.startswith(_DROPPED)}
    expected = network.state_dict()
    missing, unknown = sorted(set(expected) - set(kept)), sorted(set(kept) - set(expected))
    reshaped = [
        f"{name} {tuple(kept[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(kept) & set(expected))
        if kept[name].shape != expected[name].shape
    ]
    if missing or unknown or reshaped:
        raise CheckpointError(
            explain(
                f"the {len(expected)} tensors of this MDM variant",
                f"missing {missing[:4]}, unknown {unknown[:4]}, other shapes {reshaped[:4]}",
                "released MDM checkpoint",
                "Read arch, text_encoder_type and dataset in the args.json beside the file and set them.",
            )
        )
    return kept
