"""Data made ahead: by others, in whatever order it is asked for, once each."""

from __future__ import annotations

import os

import pytest

from context_diffusion.training.data.pools import Ahead


def made_by(number: int) -> tuple[int, int]:
    if number == 13:
        raise ValueError("no thirteen")
    return number, os.getpid()


@pytest.mark.parametrize("processes", [0, 2])
def test_numbers_are_made_elsewhere_whatever_comes_after_what(processes: int) -> None:
    ahead = Ahead(made_by, processes)
    try:
        found = [ahead.at(number) for number in (0, 1, 2, 7, 8, 3, 12)]
        assert [number for number, _ in found] == [0, 1, 2, 7, 8, 3, 12]
        assert ({own for _, own in found} == {os.getpid()}) == (processes == 0)
        with pytest.raises(ValueError, match="no thirteen"):
            ahead.at(13)
        assert ahead.at(14)[0] == 14, "one that cannot be made stops no other"
    finally:
        ahead.close()
