"""Through how many of the last steps should DRaFT send its gradient? Memory and time grow with them."""

from tune_spaces.space import LEARNING_RATE, SearchSpace

SPACE = SearchSpace(
    question="last steps K and learning rate of DRaFT",
    fields={
        "finetune.strategy": "DRaFT",
        "finetune.strategy.last_steps": {"choice": [1, 2, 3, 5, 10]},
        **LEARNING_RATE,
    },
)
