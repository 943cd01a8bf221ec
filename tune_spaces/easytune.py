"""How should EasyTune weigh its reward terms, how fast should its window move, and how wide should it be?"""

from tune_spaces.space import SearchSpace

SPACE = SearchSpace(
    question="reward weights, sweep ratio and window size of EasyTune",
    fields={
        "finetune.strategy": "EasyTune",
        "finetune.weights.semantic": 1.0,
        "finetune.weights.smoothness": {"loguniform": [0.02, 0.5]},
        "finetune.weights.preference": {"loguniform": [0.0005, 0.02]},
        "finetune.weights.authenticity": {"loguniform": [0.0005, 0.02]},
        "finetune.weights.similarity": {"choice": [0.0, 0.03, 0.1]},
        "finetune.strategy.sweep_ratio": {"uniform": [0.0, 0.6]},
        "finetune.strategy.window": {"choice": [1, 2, 3, 4, 6]},
    },
)
