"""How should AlignProp cut its chain short?

A mode ignores the fields of the others: boundary_* act in "truncated", keep_prob in "bernoulli".
"""

from tune_spaces.space import LEARNING_RATE, SearchSpace

SPACE = SearchSpace(
    question="truncation and learning rate of AlignProp",
    fields={
        "finetune.strategy": "AlignProp",
        "finetune.strategy.mode": {"choice": ["truncated", "uniform", "bernoulli"]},
        "finetune.strategy.boundary_mean": {"uniform": [0.5, 0.95]},
        "finetune.strategy.boundary_std": {"uniform": [0.02, 0.3]},
        "finetune.strategy.keep_prob": {"uniform": [0.1, 1.0]},
        **LEARNING_RATE,
    },
)
