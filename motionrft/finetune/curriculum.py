"""The moving window of trained denoising steps (Eq. 25)."""

from __future__ import annotations


def curriculum_window(num_steps: int, window: int, progress: float, sweep_ratio: float) -> range:
    """Return the `window` consecutive steps trained at `progress`.

    The window moves linearly from the noisiest to the cleanest steps during the first `sweep_ratio` of training, then
    stays on the cleanest: start = round(progress / sweep_ratio * (S - k)), halves to even.

    Args:
        num_steps: denoising steps S >= 1.
        window: k, 1 <= k <= S.
        progress: in [0, 1].
        sweep_ratio: rho in [0, 1]; 0 means always the last k steps.

    Raises:
        ValueError: an argument outside its range.

    Source: Eq. 25, curriculum timestep scheduling.
    Differs: indices are loop steps (0 = noisiest); the paper counts steps to go.

    >>> [(w.start, w.stop - 1) for w in (curriculum_window(50, 10, p, 0.4) for p in (0.0, 0.2, 1.0))]
    [(0, 9), (20, 29), (40, 49)]
    """
    if not 1 <= window <= num_steps:
        raise ValueError(f"need 1 <= window <= {num_steps} denoising steps, got {window}")
    if not 0.0 <= progress <= 1.0 or not 0.0 <= sweep_ratio <= 1.0:
        raise ValueError(f"progress and sweep_ratio must be in [0, 1], got {progress} and {sweep_ratio}")
    last = num_steps - window
    start = last if sweep_ratio == 0.0 or progress > sweep_ratio else round(progress / sweep_ratio * last)
    return range(start, start + window)
