"""Reward terms on joint positions in metres, for any representation. Importing this module registers them.

Letters: B batch, T frames, J joints.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from motionrft.core.types import Representation, valid_mask
from motionrft.representations.convert import to_joints
from motionrft.representations.skeleton import T2M
from motionrft.reward.terms import MotionScale, masked_mean, register_term

_TOES = (10, 11)  # left_foot, right_foot of the 22 joints
_CONTACT_HEIGHT_M = 0.07
_CONTACT_SOFTNESS_M = 0.01


@register_term
class FootSliding:
    """Minus the planar toe speed while in contact, metres per second.

    A toe is in contact softly below 7 cm. The contact weight carries no gradient: sliding must not be cured by
    lifting the foot.
    """

    name: ClassVar[str] = "foot_sliding"

    def __call__(
        self, motion_BTD: Tensor, lengths_B: Tensor, representation: Representation, normalizer: MotionScale
    ) -> Tensor:
        """Return (B,), at most 0."""
        toes_BTJ3 = to_joints(motion_BTD, representation)[:, :, list(_TOES)]
        step = toes_BTJ3[:, 1:, :, [0, 2]] - toes_BTJ3[:, :-1, :, [0, 2]]
        speed = torch.sqrt(step.square().sum(-1) + 1e-12) * T2M.fps  # the constant keeps the gradient finite at rest
        lower = torch.maximum(toes_BTJ3[:, 1:, :, 1], toes_BTJ3[:, :-1, :, 1]).detach()
        contact = torch.sigmoid((_CONTACT_HEIGHT_M - lower) / _CONTACT_SOFTNESS_M)
        return -masked_mean((speed * contact).mean(-1), valid_mask(lengths_B - 1, speed.shape[1]))
