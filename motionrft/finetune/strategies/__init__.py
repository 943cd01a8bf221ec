"""Fine-tuning strategies by name: one small frozen dataclass each."""

from motionrft.finetune.plan import Strategy
from motionrft.finetune.strategies.alignprop import AlignProp
from motionrft.finetune.strategies.draft import DRaFT
from motionrft.finetune.strategies.drtune import DRTune
from motionrft.finetune.strategies.easytune import EasyTune
from motionrft.finetune.strategies.refl import ReFL

STRATEGIES: dict[str, type[Strategy]] = {
    "easytune": EasyTune,
    "refl": ReFL,
    "draft": DRaFT,
    "alignprop": AlignProp,
    "drtune": DRTune,
}

__all__ = ["STRATEGIES", "AlignProp", "DRTune", "DRaFT", "EasyTune", "ReFL", "Strategy"]
