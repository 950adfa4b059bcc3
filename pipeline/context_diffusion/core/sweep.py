"""A job's matrix, row setting -> values: which images a row becomes. Knows a row's settings, nothing of rows
or files."""

from __future__ import annotations

import itertools
import math
from typing import Any

from pydantic import ValidationError

from context_diffusion.core.settings import Settings, did_you_mean

Matrix = dict[str, list[Any]]  # the axes, in the order in which the job names them
NOT_AXES = {  # why not
    "width": "a row's query is loaded at one size",
    "height": "a row's query is loaded at one size",
    "num_images": "it is the same for all; say it in `settings:`",
}
MAX_IMAGES = 256  # of a row


def checked_matrix(matrix: Matrix, settings: type[Settings]) -> Matrix:
    """The axes with their values as the settings' model reads them. Raises ValueError with all that is
    wrong."""
    wrong, checked = [], dict[str, list[Any]]()
    axes = [name for name in settings.model_fields if name not in NOT_AXES]
    for name, values in matrix.items():
        if name in NOT_AXES:
            wrong.append(f"{name} cannot be an axis: {NOT_AXES[name]}")
        elif name not in axes:
            wrong.append(f"{name} is no row setting; {did_you_mean(name, axes)}")
        elif not values:
            wrong.append(f"{name} has no values: name one or more, or leave it out")
        else:
            checked[name] = []
            for value in values:
                try:
                    read = _read(name, value, settings)
                except ValueError as error:
                    wrong.append(str(error))
                    continue
                if read in checked[name]:
                    wrong.append(f"{name} has the value {value!r} twice")
                checked[name].append(read)
    if wrong:
        raise ValueError("; ".join(wrong))
    return checked


def combinations(matrix: Matrix) -> list[dict[str, Any]]:
    """All of them, the last axis fastest; of no axes the empty one."""
    return [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]


def check_combinations(settings: Settings, matrix: Matrix) -> None:
    """Raise ValueError where a row's settings do not go together with a combination, or make too many
    images."""
    count = math.prod(map(len, matrix.values()))
    if (images := count * settings.num_images) > MAX_IMAGES:
        counted = f"{count} combinations of {settings.num_images} image(s) are {images}"
        raise ValueError(f"matrix: {counted} images of one row, at most {MAX_IMAGES} are allowed")
    for combination in combinations(matrix):
        try:
            type(settings).model_validate(settings.model_dump() | combination)
        except ValidationError as error:
            raise ValueError(f"matrix: at {_named(combination)}: {_message(error)}") from None


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


def _read(name: str, value: Any, settings: type[Settings]) -> Any:
    if name == "seed" and value is None:
        raise ValueError("seed: null is what rows have without this axis; name numbers")
    try:
        return getattr(settings.model_validate({name: value}), name)
    except ValidationError as error:
        raise ValueError(f"{name}: {_message(error)}, got {value!r}") from None


def _named(combination: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in combination.items())


def _message(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ").replace("Input should", "should")
