"""What the viewer is asked for: which rows, in which order, which page of them; and that as SQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from context_diffusion.core.schema import PROMPT, SCORE_COLUMNS

SORTS = ("id", "seconds", *SCORE_COLUMNS)


@dataclass(frozen=True)
class Question:
    """Of rows: those whose id, prompt or reason has `text` in it, and so on; low <= score < high, 1 and above included."""

    text: str = ""
    status: str = ""
    code: str = ""
    score: str = ""
    low: float = 0.0
    high: float = 1.0
    sort: str = ""
    order: str = "asc"
    offset: int = 0
    limit: int = 60

    def __post_init__(self) -> None:
        """Names become part of the SQL, so only known ones pass; all else is a parameter."""
        for name, value, known in (
            ("score", self.score, SCORE_COLUMNS),
            ("sort", self.sort, SORTS),
            ("order", self.order, ("asc", "desc")),
        ):
            if value and value not in known:
                raise ValueError(f"{name}={value[:80]!r}: known are {', '.join(known)}")
        if not (0 <= self.offset < 2**62 and 1 <= self.limit <= 200):
            raise ValueError(f"offset={self.offset}, limit={self.limit}: from 0, and 1 to 200 rows")

    def where(self) -> tuple[str, list[Any]]:
        said = f"lower(concat_ws(chr(10), id, {PROMPT}, error_message))"
        tests: list[tuple[str, Any]] = []
        tests += [(f"contains({said}, lower(?))", self.text)] if self.text else []
        tests += [("status = ?", self.status)] if self.status else []
        tests += [("error_code = ?", self.code)] if self.code else []
        if self.score:
            tests += [(f"isfinite({self.score}) = ?", True)]
            tests += [(f"{self.score} >= ?::double", self.low)] if self.low > 0 else []
            tests += [(f"{self.score} < ?::double", self.high)] if self.high < 1 else []
        return " and ".join(["true", *(test for test, _ in tests)]), [value for _, value in tests]

    def ordered(self) -> str:
        return (f"{self.sort} {self.order} nulls last, " if self.sort else "") + "part, number"
