"""What does EasyTune's gain in retrieval cost in FID? The same fields as `easytune`, and a front instead of one winner.

Every trial runs to its end: asha compares trials by one number. `val/score` picks one configuration of the front.
"""

from dataclasses import replace

from tune_spaces.easytune import SPACE as EASYTUNE
from tune_spaces.space import VALIDATION_SCORE, SearchSpace

SPACE = SearchSpace(
    question="R-precision against FID over reward weights, sweep ratio and window size of EasyTune",
    fields=EASYTUNE.fields,
    search=replace(
        VALIDATION_SCORE,
        objectives={"val/r_precision_top1": "max", "val/fid": "min"},
        search="optuna",
        scheduler="none",
        num_samples=24,
    ),
)
