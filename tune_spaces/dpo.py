"""How hard should Diffusion-DPO prefer, and among how many samples?"""

from tune_spaces.space import LEARNING_RATE, SearchSpace

SPACE = SearchSpace(
    question="beta, draws, group size, guidance and learning rate of Diffusion-DPO",
    fields={
        "finetune.strategy": "DiffusionDPO",
        "finetune.strategy.beta": {"loguniform": [10.0, 5000.0]},
        "finetune.strategy.draws": {"choice": [1, 2, 4]},
        "finetune.strategy.samples": {"choice": [2, 4, 8]},
        "finetune.strategy.guided": {"choice": [True, False]},
        **LEARNING_RATE,
    },
)
