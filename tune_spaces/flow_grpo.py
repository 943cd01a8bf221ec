"""How many samples does Flow-GRPO compare, how much noise, and how near the reference?"""

from tune_spaces.space import LEARNING_RATE, SearchSpace

SPACE = SearchSpace(
    question="group size, noise, divergence from the reference and learning rate of Flow-GRPO",
    fields={
        "finetune.strategy": "FlowGRPO",
        "finetune.strategy.group": {"choice": [4, 8, 16]},
        "finetune.strategy.noise": {"uniform": [0.3, 1.0]},
        "finetune.strategy.kl_weight": {"loguniform": [1e-4, 1e-1]},
        "finetune.strategy.updates": {"choice": [1, 2, 4]},
        **LEARNING_RATE,
    },
)
