"""Fine-tuning strategies by name: one small frozen dataclass each."""

from motionrft.finetune.strategies.alignprop import AlignProp
from motionrft.finetune.strategies.ddpo import DDPO
from motionrft.finetune.strategies.dpo import DiffusionDPO
from motionrft.finetune.strategies.draft import DRaFT, DRaFTLV
from motionrft.finetune.strategies.drtune import DRTune
from motionrft.finetune.strategies.easytune import EasyTune
from motionrft.finetune.strategies.flow_grpo import FlowGRPO
from motionrft.finetune.strategies.refl import ReFL
from motionrft.finetune.strategies.sopo import SoPo
from motionrft.finetune.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    "easytune": EasyTune,
    "refl": ReFL,
    "draft": DRaFT,
    "draft_lv": DRaFTLV,
    "alignprop": AlignProp,
    "drtune": DRTune,
    "ddpo": DDPO,
    "flow_grpo": FlowGRPO,
    "dpo": DiffusionDPO,
    "sopo": SoPo,
}

__all__ = [
    "DDPO",
    "STRATEGIES",
    "AlignProp",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "DiffusionDPO",
    "EasyTune",
    "FlowGRPO",
    "ReFL",
    "SoPo",
    "Strategy",
]
