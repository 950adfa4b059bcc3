"""Poison rules without Ray: engines that die are told by an exception that a test takes for a process's
end."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.core.errors import ErrorCode
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.generation.fault_ledger import DEATHS, GuardedEngine, Ledger, SharedOrAlone
from support.tiny import request

JOB = GenerateJob.model_validate({"kind": "generate", "manifest": "m", "output": "o"})


class ProcessEnded(BaseException):
    pass


class Deadly:
    """Ends its process at some rows, given by id."""

    def __init__(self, deadly: set[str]) -> None:
        self.deadly = deadly

    def generate(self, requests: list[Request]) -> list[Result | Failure]:
        if any(one.id in self.deadly for one in requests):
            raise ProcessEnded
        return [Result(one.query, 0.0, 1, "cpu") for one in requests]


@given(st.integers(1, 6), st.sets(st.integers(0, 5)))
def test_exactly_the_deadly_rows_fail_after_a_bounded_number_of_deaths(count: int, bad: set[int]) -> None:
    ledger = Ledger()
    rows = [[request(number)] for number in range(count)]
    deadly = {f"row-{number}" for number in bad if number < count}
    for _death in range(1 + DEATHS * len(deadly) + 1):
        try:  # a new process each time, the ledger stays
            outcomes = GuardedEngine(Deadly(deadly), ledger).generate_shard(7, rows)
            break
        except ProcessEnded:
            continue
    else:
        pytest.fail("the shard never ended")
    failed = {row[0].id for row, outcome in zip(rows, outcomes, strict=True) if isinstance(outcome, Failure)}
    assert failed == deadly
    assert all(outcome.code == ErrorCode.ENGINE_CRASH for outcome in outcomes if isinstance(outcome, Failure))


def test_an_innocent_neighbour_is_run_alone_but_never_charged() -> None:
    ledger = Ledger()
    ledger.hold(1)
    ledger.hold(2)  # both in the engine that died
    assert ledger.ask(1) == (True, [])
    assert ledger.ask(2) == (True, [])
    guarded = GuardedEngine(Deadly(set()), ledger)
    assert all(isinstance(o, Result) for o in guarded.generate_shard(2, [[request(1)], [request(2)]]))
    assert ledger.ask(3) == (False, [])


def test_a_run_that_is_stopped_begins_no_shard_and_knows_what_is_under_way() -> None:
    ledger = Ledger()
    for shard in (1, 2):
        assert ledger.ask(shard) == (False, [])
        ledger.hold(shard)
    ledger.release(1)
    ledger.stop()
    assert ledger.ask(3) is None
    assert ledger.in_progress() == ({2}, {1})


def test_who_is_alone_is_alone() -> None:
    lock, inside, most = SharedOrAlone(), [0, 0], [0]
    barrier = threading.Barrier(6)

    def work(kind: int) -> None:
        barrier.wait()
        for _ in range(30):
            with lock.alone() if kind else lock.shared():
                inside[kind] += 1
                assert not (inside[1] and inside[0]), "shared beside alone"
                assert inside[1] <= 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0002)
                inside[kind] -= 1

    errors: list[BaseException] = []
    threading.excepthook = lambda arguments: errors.append(arguments.exc_value or RuntimeError())
    threads = [threading.Thread(target=work, args=(int(number < 2),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    threading.excepthook = threading.__excepthook__
    assert not errors
    assert most[0] > 1, "sharing was never seen"


def test_a_shard_that_begins_again_is_known_after_a_death_and_after_its_pictures_were_lost() -> None:
    ledger = Ledger()
    assert ledger.ask(1) == (False, [])
    assert not ledger.begun(1)
    ledger.hold(1)
    ledger.ask(1)  # its engine died
    assert ledger.begun(1)
    ledger.ask(2)
    ledger.hold(2)
    ledger.release(2)
    ledger.ask(2)  # made, and lost before it was written
    assert ledger.begun(2)
    assert not ledger.begun(3)
