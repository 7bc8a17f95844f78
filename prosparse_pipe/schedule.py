"""The staged L1 schedule of ProSparse (arXiv 2402.13516, section 3.2): lambda as a function of the optimizer step.

Stage 0 trains with lambda 0, stage 1 with a constant lambda_1; each later stage i raises lambda from lambda_{i-1} to
lambda_i along half a sine. Two equal neighbours make a constant stage. After the last stage lambda stays.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from prosparse_pipe.errors import ProsparseError


@dataclasses.dataclass(frozen=True)
class Stage:
    """lambda_i >= 0 and T_i, the optimizer step at which the stage ends (counted from the start of the run)."""

    coefficient: float
    end_step: int


# (lambda_i, T_i) as published; the paper's appendix. "1b" is MiniCPM-S up to its decay stage.
PUBLISHED = {
    "7b": ((0.0, 5000), (5e-3, 6000), (5e-2, 10000), (5e-2, 12000), (2e-1, 16000), (2e-1, 16500)),
    "13b": ((0.0, 5500), (5e-3, 6750), (1e-2, 10750), (1e-2, 11000), (2e-2, 15000), (2e-2, 16000)),
    "1b": ((0.0, 10000), (1e-3, 15000), (5e-3, 20000), (5e-3, 25000), (5e-2, 35000), (5e-2, 95000)),
}


class StagedSchedule:
    """lambda for every step.

    Args:
        stages: at least one; end steps must not fall. The first is stage 0.

    Raises:
        ProsparseError: no stage, a negative coefficient, or end steps out of order.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ProsparseError("the schedule has no stages", "give [coefficient, end] pairs or a preset: 7b, 13b, 1b")
        ends = [0, *(stage.end_step for stage in stages)]
        if any(stage.coefficient < 0 or not math.isfinite(stage.coefficient) for stage in stages):
            raise ProsparseError("the schedule has a coefficient below 0", "coefficients are lambda_i >= 0")
        if any(end < start for start, end in itertools.pairwise(ends)):
            raise ProsparseError("the schedule's stages do not end one after the other", "sort them by their end")
        self.stages = tuple(stages)

    def value(self, step: int) -> float:
        """lambda of optimizer step `step`, counted from 0; that is t = step + 1 of the paper's (T_{i-1}, T_i]."""
        t = step + 1
        start = 0
        for i, stage in enumerate(self.stages):
            if t <= stage.end_step:
                if i < 2:
                    return stage.coefficient
                previous = self.stages[i - 1].coefficient
                progress = (t - start) / (stage.end_step - start)
                eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * progress) + 1)
                return previous + eta * (stage.coefficient - previous)
            start = stage.end_step
        return self.stages[-1].coefficient


def from_fractions(stages: Sequence[Sequence[float]], total_steps: int) -> StagedSchedule:
    """Stages as (lambda_i, end as a share of the run, 0 to 1), for a run of total_steps."""
    return StagedSchedule([Stage(float(coefficient), round(end * total_steps)) for coefficient, end in stages])


def preset(name: str, total_steps: int, scale: float = 1.0) -> StagedSchedule:
    """A published schedule stretched to total_steps, its coefficients times `scale`.

    Raises:
        ProsparseError: unknown name.
    """
    if name not in PUBLISHED:
        raise ProsparseError(f"unknown schedule {name!r}", f"known: {', '.join(PUBLISHED)}")
    published = PUBLISHED[name]
    last = published[-1][1]
    return from_fractions([(coefficient * scale, end / last) for coefficient, end in published], total_steps)
