"""How many samples does DDPO compare, how much noise, and how far may a step go?"""

from tune_spaces.space import LEARNING_RATE, SearchSpace

SPACE = SearchSpace(
    question="group size, noise, clip range and learning rate of DDPO",
    fields={
        "finetune.strategy": "DDPO",
        "finetune.strategy.group": {"choice": [4, 8, 16]},
        "finetune.strategy.noise": {"uniform": [0.3, 1.0]},
        "finetune.strategy.clip_range": {"loguniform": [1e-5, 1e-2]},
        "finetune.strategy.inner_epochs": {"choice": [1, 2]},
        **LEARNING_RATE,
    },
)
