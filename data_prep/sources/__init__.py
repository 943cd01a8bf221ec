"""Where clips come from: `build_source` maps a config to one of them."""

from __future__ import annotations

from data_prep.sources.base import ROT_SOURCES, SPLITS, Rejected, Source, SourceClip
from motionrft.config.prepare import PrepareConfig
from motionrft.core.errors import ConfigError

__all__ = ["ROT_SOURCES", "SPLITS", "Rejected", "Source", "SourceClip", "build_source"]


def build_source(config: PrepareConfig) -> Source:
    """Return the source a config names. Imports only that one.

    Raises:
        ConfigError: unknown name.
        DataError: the source cannot be used, e.g. its path does not exist.
    """
    if config.source == "synthetic":
        from data_prep.sources.synthetic import SyntheticConfig, SyntheticSource

        return SyntheticSource(
            SyntheticConfig(num_clips=config.num_clips, seed=config.seed, fps=config.fps, families=config.families)
        )
    if config.source == "bvh":
        from data_prep.sources.bvh import BvhSource, load_mapping

        return BvhSource(config.path, load_mapping(config.mapping), config.val_frac, config.test_frac)
    if config.source == "humanml3d":
        from data_prep.sources.humanml3d import HumanML3DSource

        return HumanML3DSource(config.path)
    raise ConfigError(f"prepare: unknown source {config.source!r}")
