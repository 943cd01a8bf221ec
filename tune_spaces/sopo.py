"""How hard should SoPo prefer the data set's clips, and from which reward on should it leave its own samples alone?"""

from tune_spaces.space import LEARNING_RATE, SearchSpace

SPACE = SearchSpace(
    question="beta, draws, group size, threshold, guidance and learning rate of SoPo",
    fields={
        "finetune.strategy": "SoPo",
        "finetune.strategy.beta": {"loguniform": [0.3, 300.0]},
        "finetune.strategy.draws": {"choice": [1, 2, 4]},
        "finetune.strategy.samples": {"choice": [1, 2, 4]},
        "finetune.strategy.threshold": {"uniform": [0.2, 0.8]},
        "finetune.strategy.guided": {"choice": [True, False]},
        **LEARNING_RATE,
    },
)
