"""What came out of a run."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Measured:
    """How a model does: on held-out pairs, and in its own words."""

    loss: float
    dialect: float
    answers: list[str]  # to PROMPTS, then to held-out questions


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of one run."""

    model: str
    method: str
    learning_rate: float
    trainable: int
    file: Path
    file_bytes: int
    seconds_per_step: float
    losses: list[float]  # of each step
    penalty: float  # what regularisers add to `losses`, in the end
    ceiling: float  # dialect score of the data
    before: Measured
    after: Measured
    reloaded: list[str]
    merged: list[str]
