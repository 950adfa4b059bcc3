"""Which branches a row pays for, and that they add up to the formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.core.settings import Settings
from context_diffusion.engine.guidance import guidance_branches
from context_diffusion.engine.preparation import control_window, start_step

scales = st.floats(0, 20).map(lambda value: round(value, 2))


@given(scales, scales, st.tuples(*[st.floats(-5, 5)] * 3))
def test_the_branches_add_up_to_the_formula(
    text: float, context: float, outputs: tuple[float, float, float]
) -> None:
    e0, e_context, e_both = outputs
    wanted = (
        e0 + max(context, 1) * (e_context - e0) + max(text, 1) * (e_both - e_context)
    )  # 1 or less: no guidance
    found = guidance_branches(Settings(guidance_scale=text, context_guidance_scale=context), has_prompt=True)
    values = {(False, False): e0, (True, False): e_context, (True, True): e_both}
    assert sum(b.weight * values[b.contexts, b.prompt] for b in found) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "context", "prompt", "lanes"),
    [
        (1, None, True, 1),
        (1, None, False, 1),
        (0, None, True, 1),
        (3, None, True, 2),
        (3, 2, True, 3),
        (3, None, False, 2),
        (3, 1, False, 1),
        (3, 1, True, 2),
    ],
)
def test_a_row_pays_for_the_lanes_that_it_needs(
    text: float, context: float | None, prompt: bool, lanes: int
) -> None:
    settings = Settings(guidance_scale=text, context_guidance_scale=context)
    assert len(guidance_branches(settings, prompt)) == lanes


@given(st.integers(1, 100), st.floats(0, 0.9), st.floats(0.01, 1))
def test_the_window_is_what_diffusers_keeps(steps: int, start: float, width: float) -> None:
    end = min(1.0, start + width)
    kept = [i for i in range(steps) if 1.0 - float(i / steps < start or (i + 1) / steps > end)]
    assert list(control_window(steps, start, end)) == kept


@given(st.integers(1, 200), st.floats(0.001, 1))
def test_image_to_image_starts_where_diffusers_starts(steps: int, strength: float) -> None:
    first = start_step(steps, strength)
    assert first == steps - min(int(steps * strength), steps)
    assert start_step(steps, None) == 0
