"""A job's matrix, row setting -> values: which images a row becomes. Knows a row's settings, nothing of rows or files."""

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
    """The axes with their values as the settings' model reads them. Raises ValueError with all that is wrong."""
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


def combined(settings: Settings, matrix: Matrix) -> list[Settings]:
    """A row's settings at each combination: an axis goes before what the row says itself. Raises ValueError for those that
    do not go together, and for too many images."""
    count = math.prod(map(len, matrix.values()))
    if (images := count * settings.num_images) > MAX_IMAGES:
        wrong = f"{count} combinations of {settings.num_images} image(s) are {images}"
        raise ValueError(f"matrix: {wrong}, allowed are {MAX_IMAGES} a row")
    own, found = settings.model_dump(), []
    for combination in combinations(matrix):
        try:
            found.append(type(settings).model_validate(own | combination))
        except ValidationError as error:
            raise ValueError(f"matrix: at {_named(combination)}: {_message(error)}") from None
    return found


def images_of(settings: Settings, matrix: Matrix) -> list[Settings]:
    """The settings of each image of a row whose seed is set, by index: image k of combination c stands at
    c * num_images + k and has seed + k, the same at all combinations."""
    images = []
    for own in combined(settings, matrix):
        assert own.seed is not None
        images += [own.model_copy(update={"seed": own.seed + k}) for k in range(own.num_images)]
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
