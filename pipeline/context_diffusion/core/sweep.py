"""A job's matrix, which maps row settings to values, and the images of a row that it generates. Knows no rows
or files."""

from __future__ import annotations

import itertools
import math
from typing import Any

from pydantic import ValidationError

from context_diffusion.core.settings import Settings, did_you_mean

Matrix = dict[str, list[Any]]  # the axes, in the order in which the job names them
NOT_AXES = {  # settings that cannot vary within a row, with the reason
    "width": "the query of a row is loaded at one size",
    "height": "the query of a row is loaded at one size",
    "num_images": "it is the same for all combinations; set it in `settings:`",
}
MAX_IMAGES = 256  # of a row


def checked_matrix(matrix: Matrix, settings: type[Settings]) -> Matrix:
    """Return the axes with their values as the settings' model reads them. Raises ValueError with all
    errors."""
    errors: list[str] = []
    checked: Matrix = {}
    axes = [name for name in settings.model_fields if name not in NOT_AXES]
    for name, values in matrix.items():
        if name in NOT_AXES:
            errors.append(f"{name} cannot be an axis: {NOT_AXES[name]}")
        elif name not in axes:
            errors.append(f"{name} is not a row setting; {did_you_mean(name, axes)}")
        elif not values:
            errors.append(f"{name} has no values: give one or more, or remove it")
        else:
            checked[name] = _checked_values(name, values, settings, errors)
    if errors:
        raise ValueError("; ".join(errors))
    return checked


def _checked_values(name: str, values: list[Any], settings: type[Settings], errors: list[str]) -> list[Any]:
    """Return an axis' valid values. Appends to `errors` what is wrong with the others."""
    checked: list[Any] = []
    for value in values:
        try:
            checked_value = _checked_value(name, value, settings)
        except ValueError as error:
            errors.append(str(error))
            continue
        if checked_value in checked:
            errors.append(f"{name} has the value {value!r} twice")
        checked.append(checked_value)
    return checked


def combinations(matrix: Matrix) -> list[dict[str, Any]]:
    """Return all combinations of the axes' values, the last axis fastest; without axes one empty
    combination."""
    return [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]


def check_combinations(settings: Settings, matrix: Matrix) -> None:
    """Raise ValueError if a row's settings are invalid in one of the combinations, or give too many
    images."""
    count = math.prod(map(len, matrix.values()))
    images = count * settings.num_images
    if images > MAX_IMAGES:
        counted = f"{count} combinations of {settings.num_images} image(s) are {images}"
        raise ValueError(f"matrix: {counted} images of one row, at most {MAX_IMAGES} are allowed")
    for combination in combinations(matrix):
        try:
            type(settings).model_validate(settings.model_dump() | combination)
        except ValidationError as error:
            values = ", ".join(f"{name} {value}" for name, value in combination.items())
            raise ValueError(f"matrix: at {values}: {_message(error)}") from None


def images_of(settings: Settings, matrix: Matrix) -> list[Settings]:
    """Return the settings of each image of a row that has a seed and whose combinations were checked.

    Axes override the row's own values. Image k of combination c has the index c * num_images + k and the seed
    seed + k, the same in all combinations.
    """
    images = []
    for combination in combinations(matrix):
        at_combination = settings.model_copy(update=combination)
        assert at_combination.seed is not None
        seeds = range(at_combination.seed, at_combination.seed + at_combination.num_images)
        images += [at_combination.model_copy(update={"seed": seed}) for seed in seeds]
    return images


def _checked_value(name: str, value: Any, settings: type[Settings]) -> Any:
    """Return a value as the settings' model reads it. Raises ValueError."""
    if name == "seed" and value is None:
        raise ValueError("seed: null is the default without this axis; give numbers")
    try:
        return getattr(settings.model_validate({name: value}), name)
    except ValidationError as error:
        raise ValueError(f"{name}: {_message(error)}, got {value!r}") from None


def _message(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ").replace("Input should", "should")
