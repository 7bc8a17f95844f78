"""The weight lambda of the sparsity penalty over the steps of a run: staged as in ProSparse, or steered to a target.

The staged schedule (arXiv 2402.13516, section 3.2) trains stage 0 with lambda 0 and stage 1 with a constant lambda_1;
each later stage i raises lambda from lambda_{i-1} to lambda_i along half a sine. Two equal neighbours make a constant
stage. After the last stage lambda stays.
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
_PUBLISHED_7B = ((0.0, 5000), (5e-3, 6000), (5e-2, 10000), (5e-2, 12000), (2e-1, 16000), (2e-1, 16500))
PUBLISHED = {
    "prosparse": _PUBLISHED_7B,
    "7b": _PUBLISHED_7B,
    "13b": ((0.0, 5500), (5e-3, 6750), (1e-2, 10750), (1e-2, 11000), (2e-2, 15000), (2e-2, 16000)),
    "1b": ((0.0, 10000), (1e-3, 15000), (5e-3, 20000), (5e-3, 25000), (5e-2, 35000), (5e-2, 95000)),
}


def half_sine(progress: float) -> float:
    """From 0 to 1 along half a sine, as progress goes from 0 to 1."""
    return 0.5 * (math.sin(-math.pi / 2 + math.pi * min(max(progress, 0.0), 1.0)) + 1)


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
                return previous + half_sine((t - start) / (stage.end_step - start)) * (stage.coefficient - previous)
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


class SparsityController:
    """lambda that makes the measured sparsity follow half a sine from where it was to a target, and stay there.

    log lambda is the sum of an integral and a proportional part of the error. Both are bounded, so a noisy batch moves
    lambda little, and the integral's speed is relative to the length of the run, so short and long runs behave alike.

    Args:
        target: sparsity at the end, 0 to 1.
        total_steps: optimizer steps of the run.
        start, end: shares of the run between which the sparsity rises; before `start` lambda is 0.
    """

    INTEGRAL = 300.0  # change of log lambda over a whole run, per unit of error
    FASTEST = 30.0  # its bound, over a whole run
    FASTEST_STEP = 0.1  # and in a step, for short runs
    PROPORTIONAL = 10.0
    MOST_PROPORTIONAL = 0.7
    SMOOTHING = 0.7
    FIRST = math.log(1e-2)
    BOUNDS = (-7.0, 6.0)

    def __init__(self, target: float, total_steps: int, start: float, end: float) -> None:
        self.target, self.total_steps, self.start, self.end = target, total_steps, start, end
        self.smoothed: float | None = None
        self.origin: float | None = None  # sparsity where the rise began
        self.integral = self.FIRST
        self.coefficient = 0.0

    def value(self, step: int) -> float:
        """lambda of optimizer step `step`, counted from 0; steps before it must have been observed."""
        return self.coefficient if step >= self.start * self.total_steps else 0.0

    def observe(self, step: int, sparsity: float) -> None:
        """Takes the sparsity measured in optimizer step `step`; sets lambda for the next."""
        self.smoothed = (
            sparsity if self.smoothed is None else self.SMOOTHING * self.smoothed + (1 - self.SMOOTHING) * sparsity
        )
        progress = (step + 1) / self.total_steps
        if progress < self.start:
            return
        if self.origin is None:
            self.origin = self.smoothed
        rise = half_sine((progress - self.start) / (self.end - self.start)) if self.end > self.start else 1.0
        error = self.origin + rise * (self.target - self.origin) - self.smoothed
        bound = min(self.FASTEST / self.total_steps, self.FASTEST_STEP)
        move = max(-bound, min(bound, self.INTEGRAL / self.total_steps * error))
        self.integral = max(self.BOUNDS[0], min(self.BOUNDS[1], self.integral + move))
        proportional = max(-self.MOST_PROPORTIONAL, min(self.MOST_PROPORTIONAL, self.PROPORTIONAL * error))
        self.coefficient = math.exp(self.integral + proportional)

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run needs to go on bit for bit."""
        names = ("smoothed", "origin", "integral", "coefficient")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
