"""The staged schedule against the paper (published points, half sines, equal neighbours), and the controller."""

import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.schedule import (
    PUBLISHED,
    SparsityController,
    Stage,
    StagedSchedule,
    from_fractions,
    half_sine,
    preset,
)

stages = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 500)), min_size=1, max_size=7).map(
    lambda parts: StagedSchedule(
        [Stage(coefficient, sum(length for _, length in parts[: i + 1])) for i, (coefficient, _) in enumerate(parts)]
    )
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_stages_end_at_their_coefficients(name):
    schedule = preset(name, PUBLISHED[name][-1][1])
    for coefficient, end in PUBLISHED[name]:
        assert schedule.value(end - 1) == pytest.approx(coefficient, abs=1e-12)


def test_7b_by_hand():
    schedule = preset("7b", 16500)
    assert [schedule.value(step) for step in (0, 4999)] == [0.0, 0.0]
    assert [schedule.value(step) for step in (5000, 5999)] == [5e-3, 5e-3]  # stage 1 is constant
    # stage 2 in the middle of its ramp, t = 8000 of (6000, 10000]
    assert schedule.value(7999) == pytest.approx(0.5 * (5e-3 + 5e-2))
    # a quarter in: eta = (1 - cos(pi / 4)) / 2
    assert schedule.value(6999) == pytest.approx(5e-3 + 0.5 * (1 - math.cos(math.pi / 4)) * 4.5e-2)
    assert {schedule.value(step) for step in range(10000, 12000)} == {5e-2}  # equal neighbours
    assert schedule.value(10**6) == 2e-1


@given(stages, st.integers(0, 4000))
def test_value_lies_between_the_neighbouring_coefficients(schedule, step):
    ends = [stage.end_step for stage in schedule.stages]
    i = next((i for i, end in enumerate(ends) if step + 1 <= end), len(ends) - 1)
    neighbours = [schedule.stages[i].coefficient, schedule.stages[max(i - 1, 0)].coefficient]
    assert min(neighbours) - 1e-12 <= schedule.value(step) <= max(neighbours) + 1e-12


@given(stages)
def test_ramps_are_continuous_and_hit_their_ends(schedule):
    for i in range(2, len(schedule.stages)):
        previous, stage = schedule.stages[i - 1], schedule.stages[i]
        length = stage.end_step - previous.end_step
        values = [schedule.value(step) for step in range(previous.end_step - 1, stage.end_step)]
        assert values[0] == pytest.approx(previous.coefficient, abs=1e-9)
        assert values[-1] == pytest.approx(stage.coefficient, abs=1e-9)
        slope = math.pi / 2 * abs(stage.coefficient - previous.coefficient) / length
        assert all(abs(b - a) <= slope + 1e-9 for a, b in itertools.pairwise(values))


@given(stages)
def test_ramps_are_monotone(schedule):
    for i in range(2, len(schedule.stages)):
        previous, stage = schedule.stages[i - 1], schedule.stages[i]
        sign = 1 if stage.coefficient >= previous.coefficient else -1
        values = [sign * schedule.value(step) for step in range(previous.end_step, stage.end_step)]
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))


@given(st.integers(20, 5000), st.floats(0.1, 100))
def test_presets_stretch_and_scale(total, scale):
    assert preset("7b", total, scale).value(total - 1) == pytest.approx(2e-1 * scale)


def test_wrong_stages_are_refused():
    for bad in ([], [[-1, 0.5]], [[0, 0.5], [1, 0.2]], [[float("nan"), 1]]):
        with pytest.raises(ProsparseError):
            from_fractions(bad, 100)
    with pytest.raises(ProsparseError, match="unknown schedule"):
        preset("70b", 100)


class Plant:
    """A model that training makes sparser: it relaxes towards a sparsity that rises with log lambda; batches are noisy.

    Args:
        steps: of the run; the relaxation takes a twentieth of it.
        gain: sparsity per unit of log lambda near .8.
    """

    def __init__(self, steps: int, gain: float, noise: float, seed: int) -> None:
        self.sparsity, self.rate, self.gain, self.noise = 0.65, min(1.0, 20 / steps), gain, noise
        self.random = random.Random(seed)

    def step(self, coefficient: float) -> float:
        drive = math.log(coefficient + 1e-9) + 3.0
        settled = 0.65 + 0.35 / (1 + math.exp(-drive * self.gain / 0.08))
        self.sparsity += self.rate * (settled - self.sparsity)
        return self.sparsity + self.random.gauss(0, self.noise)


@pytest.mark.parametrize("steps", [150, 1000, 8000])
@pytest.mark.parametrize("gain", [0.02, 0.05])
def test_the_controller_reaches_its_target_and_stays(steps, gain):
    controller, plant = SparsityController(0.89, steps, 0.1, 0.7), Plant(steps, gain, 0.004, steps)
    path = []
    for step in range(steps):
        coefficient = controller.value(step)
        assert (coefficient > 0) == (step >= 0.1 * steps) or step == math.ceil(0.1 * steps)
        controller.observe(step, plant.step(coefficient))
        path.append(plant.sparsity)
    assert max(abs(s - 0.89) for s in path[round(0.85 * steps) :]) < 0.02
    assert max(path) < 0.89 + 0.03
    assert path[round(0.3 * steps)] < 0.82  # gradually


def test_a_controller_goes_on_where_another_stopped():
    steps = 300
    whole, first = SparsityController(0.9, steps, 0.05, 0.6), SparsityController(0.9, steps, 0.05, 0.6)
    measured = [0.6 + 0.3 * half_sine(step / steps) + 0.01 * math.sin(step) for step in range(steps)]
    for step in range(140):
        whole.observe(step, measured[step])
        first.observe(step, measured[step])
    second = SparsityController(0.9, steps, 0.05, 0.6)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(140, steps):
        assert second.value(step) == whole.value(step)
        whole.observe(step, measured[step])
        second.observe(step, measured[step])


def test_a_model_that_does_not_answer_does_not_make_lambda_infinite():
    controller = SparsityController(0.95, 2000, 0.0, 0.1)
    for step in range(2000):
        controller.observe(step, 0.5)
    assert math.log(controller.value(2000)) <= SparsityController.BOUNDS[1] + SparsityController.MOST_PROPORTIONAL
