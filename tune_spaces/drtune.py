"""How many steps should DRTune learn from, and how early may it stop?"""

from tune_spaces.space import LEARNING_RATE, SearchSpace

SPACE = SearchSpace(
    question="trained steps K, stop window M and learning rate of DRTune",
    fields={
        "finetune.strategy": "DRTune",
        "finetune.strategy.grad_steps": {"choice": [1, 2, 3, 5, 8]},
        "finetune.strategy.last_steps": {"choice": [1, 2, 3, 5, 10]},
        **LEARNING_RATE,
    },
)
