"""How should EasyTune weigh its reward terms, how fast should its window move, and how wide should it be?

Metric: `val/score`, R-precision on validation minus what FID and jerk got worse (`recipes.watch.validation_score`);
never the training reward, which every trial can raise by hacking it.
"""

from motionrft.runtime.tune import SearchConfig
from tune_spaces.space import SearchSpace

SPACE = SearchSpace(
    question="reward weights, sweep ratio and window size of EasyTune",
    fields={
        "finetune.weights.semantic": {"choice": [1.0]},
        "finetune.weights.smoothness": {"loguniform": [0.02, 0.5]},
        "finetune.weights.preference": {"loguniform": [0.0005, 0.02]},
        "finetune.weights.authenticity": {"loguniform": [0.0005, 0.02]},
        "finetune.weights.similarity": {"choice": [0.0, 0.03, 0.1]},
        "finetune.strategy.sweep_ratio": {"uniform": [0.0, 0.6]},
        "finetune.strategy.window": {"choice": [1, 2, 3, 4, 6]},
    },
    search=SearchConfig(metric="val/score", mode="max", num_samples=8, grace_reports=1, max_reports=4),
)
