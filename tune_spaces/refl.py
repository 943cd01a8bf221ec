"""From how many of the last steps should ReFL draw the one that learns?"""

from tune_spaces.space import LEARNING_RATE, SearchSpace

SPACE = SearchSpace(
    question="last steps and learning rate of ReFL",
    fields={
        "finetune.strategy": "ReFL",
        "finetune.strategy.last_steps": {"choice": [1, 2, 3, 5, 8, 10]},
        **LEARNING_RATE,
    },
)
