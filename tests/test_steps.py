from __future__ import annotations

import pytest

from probekit.hooks import ProbekitError, Steps
from probekit.hooks.steps import distinct_timesteps

SCHEDULE = (999.0, 749.0, 499.0, 249.0)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("all", {0, 1, 2, 3}),
        ("0-1", {0, 1}),
        ("3,0", {0, 3}),
        ("0,2-3", {0, 2, 3}),
        ("0%-50%", {0, 1}),
        ("50%-100%", {2, 3}),
        ("t1000-499", {0, 1, 2}),
        ("t499-0", {2, 3}),
    ],
)
def test_every_way_to_write_steps(text: str, steps: set[int]) -> None:
    assert Steps.parse(text).resolve(SCHEDULE) == steps


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "50%-20%", "t200-1000", "5-3", "0%-120%"])
def test_what_is_no_steps_is_refused(text: str) -> None:
    with pytest.raises(ProbekitError):
        Steps.parse(text)


@pytest.mark.parametrize(("steps", "said"), [(Steps(indices=(9,)), "0 to 3"), (Steps(timesteps=(200, 100)), "999 down to 249")])
def test_steps_outside_the_schedule_are_refused(steps: Steps, said: str) -> None:
    with pytest.raises(ProbekitError, match=said):
        steps.resolve(SCHEDULE)


def test_windows_of_fractions_cover_every_step_once() -> None:
    for n in (1, 3, 7, 20, 51):
        schedule = [float(t) for t in range(n, 0, -1)]
        covered = [i for k in range(min(4, n)) for i in Steps(fraction=(k / min(4, n), (k + 1) / min(4, n))).resolve(schedule)]
        assert sorted(covered) == list(range(n))


def test_repeated_timesteps_count_once() -> None:
    from diffusers import HeunDiscreteScheduler, PNDMScheduler

    heun, pndm = HeunDiscreteScheduler(), PNDMScheduler(skip_prk_steps=True)
    heun.set_timesteps(10)
    pndm.set_timesteps(10)
    assert len(heun.timesteps) == 19 and len(distinct_timesteps(heun)) == 10
    assert len(pndm.timesteps) == 11 and len(distinct_timesteps(pndm)) == 10
