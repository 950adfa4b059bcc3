"""A viewer's query for rows: filter, order and page, and its translation to SQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from context_diffusion.core.schema import PROMPT, SCORE_COLUMNS

SORT_COLUMNS = ("id", "seconds", *SCORE_COLUMNS)
ORDERS = ("asc", "desc")
MAX_LIMIT = 200


@dataclass(frozen=True)
class RowQuery:
    """A filter over rows, their order and a page of them. An empty text means no filter.

    text: searched in id, prompt and error message; score: filtered to low <= score < high, without an upper
    bound if high is 1.
    """

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
        """Check the names that become part of the SQL. Raises ValueError.

        All other values are passed to the SQL as parameters.
        """
        names = (
            ("score", self.score, SCORE_COLUMNS),
            ("sort", self.sort, SORT_COLUMNS),
            ("order", self.order, ORDERS),
        )
        for key, name, allowed in names:
            if name and name not in allowed:
                raise ValueError(f"{key}={name[:80]!r}: expected one of {', '.join(allowed)}")
        if not 0 <= self.offset < 2**62:
            raise ValueError(f"offset={self.offset}: expected 0 or more")
        if not 1 <= self.limit <= MAX_LIMIT:
            raise ValueError(f"limit={self.limit}: expected 1 to {MAX_LIMIT}")

    def where(self) -> tuple[str, list[Any]]:
        """Return the condition and its parameters."""
        searched = f"lower(concat_ws(chr(10), id, {PROMPT}, error_message))"
        tests: list[tuple[str, Any]] = []
        tests += [(f"contains({searched}, lower(?))", self.text)] if self.text else []
        tests += [("status = ?", self.status)] if self.status else []
        tests += [("error_code = ?", self.code)] if self.code else []
        if self.score:
            tests += [(f"isfinite({self.score}) = ?", True)]
            tests += [(f"{self.score} >= ?::double", self.low)] if self.low > 0 else []
            tests += [(f"{self.score} < ?::double", self.high)] if self.high < 1 else []
        return " and ".join(["true", *(test for test, _ in tests)]), [value for _, value in tests]

    def order_by(self) -> str:
        """Return the sort keys.

        Rows without a value come last, equal ones in OUTPUT's order; without a sort, failed rows come first.
        """
        first = f"{self.sort} {self.order} nulls last" if self.sort else "status = 'failed' desc"
        return f"{first}, part, number"
