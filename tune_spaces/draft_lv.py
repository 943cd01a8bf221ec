"""How often should DRaFT-LV noise its final sample again?

The sum of the gradients differs from their mean only under `optim.grad_clip`: AdamW divides by their size.
"""

from tune_spaces.space import LEARNING_RATE, SearchSpace

SPACE = SearchSpace(
    question="noises, reduction and learning rate of DRaFT-LV",
    fields={
        "finetune.strategy": "DRaFTLV",
        "finetune.strategy.samples": {"choice": [1, 2, 4, 8]},
        "finetune.strategy.reduction": {"choice": ["mean", "sum"]},
        **LEARNING_RATE,
    },
)
