"""Errors that teach: what was expected, what came, where, and what to do.

Every error a user can cause is a `MotionRFTError`; the CLI prints it as one block and exits with code 2.
Wrong arguments to pure functions stay `ValueError`.
"""


class MotionRFTError(Exception):
    """Base of every error whose message is written for the user."""


class ConfigError(MotionRFTError):
    """A configuration that cannot be run: unknown key, wrong type, values that contradict each other."""


class DataError(MotionRFTError):
    """A dataset, clip, caption or statistics file that cannot be used."""


class RepresentationError(DataError):
    """A motion array whose representation, layout or normaliser is not the expected one."""


class CheckpointError(MotionRFTError):
    """A checkpoint that is missing, torn, unsafe to read, or belongs to something else."""


class NumericalError(MotionRFTError):
    """Non-finite rewards, losses, gradients or statistics."""


class ClusterError(MotionRFTError):
    """A Ray cluster that is absent, too small, or refuses the connection."""


def explain(expected: str, got: str, where: str, do: str) -> str:
    """Return the four-part message every user-facing error carries."""
    return f"expected {expected}; got {got} ({where}). {do}"
