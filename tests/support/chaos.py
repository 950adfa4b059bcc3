"""Kills parts of a running job at random moments, or starts it twice at once, runs the same command again,
and compares with an undisturbed run.

python tests/support/chaos.py N [--seed S] [--first K] [--folder DIR]    a JSON line a kill; exit 1 where
anything was lost or torn

There each kill strikes the run that goes on with what the one before left, until one gets through and is
compared."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from context_diffusion.cluster.supervisor import _members
from support.manifests import job_values, write_manifest
from support.output_reader import plan_rows, read_output
from support.processes import COMMAND, ENVIRONMENT, PATIENCE_S, children
from support.tiny import tiny_model

ROWS = 48
# Who is killed: words of its command line, one of them, and the signal. "supervisor" is the command itself.
# Workers of
# tasks are named after a task only while it runs, some milliseconds: idle ones will do.
VICTIMS = {
    "supervisor": ("", signal.SIGKILL),
    "supervisor, SIGTERM": ("", signal.SIGTERM),
    "supervisor, Ctrl-C": ("", signal.SIGINT),
    "driver": ("context_diffusion.cluster.driver_process", signal.SIGKILL),
    "engine": ("MapBatches(Generate)", signal.SIGKILL),
    "load worker": ("MapBatches(LoadImages)|ray::IDLE", signal.SIGKILL),
    "write worker": ("MapBatches(WriteShard)|ray::IDLE", signal.SIGKILL),
    "gcs": ("gcs_server", signal.SIGKILL),
    "raylet and object store": ("raylet/raylet", signal.SIGKILL),
    "none: a second run of it begins": ("", 0),
}
MOMENTS = ("any", "a part is written")


@dataclass
class Chaos:
    folder: Path
    job: str
    out: Path
    seconds: float  # of an undisturbed run
    expected: dict[tuple[str, int], str]  # pictures of the undisturbed run

    def strike(self, victim: str, moment: str, share: float) -> dict[str, Any]:
        """Starts the command and kills one victim of it. -> what happened."""
        words, number = VICTIMS[victim]
        process = self._start()
        self._wait_for(moment, process, share * self.seconds)
        drivers = children(process.pid)
        second = None if number else self._start()
        struck = second is not None
        while not struck and process.poll() is None:  # a worker has its name only while it works
            struck = self._kill(process, drivers or children(process.pid), words, number)
            time.sleep(0.005)
        drivers = drivers or children(process.pid)
        codes = [one.wait(timeout=PATIENCE_S) for one in (second, process) if one]
        wrong = [f"processes left: {[_name(pid) for pid in left]}"] if (left := self._left(drivers)) else []
        wrong += _unexpected(codes)
        return {"victim": victim, "moment": moment, "struck": struck, "exits": codes, "wrong": wrong}

    def finish(self, found: dict[str, Any]) -> dict[str, Any]:
        """The command again until it says that all is done; then what differs from the undisturbed run."""
        codes, more = found["exits"], list[int]()
        while [*codes, *more][-1] != 0 and len(codes) + len(more) < 5:
            more.append(self._start().wait(timeout=PATIENCE_S))
        codes = codes + more
        wrong = [*found["wrong"], *_unexpected(more), *([f"never done: {codes}"] if codes[-1] else [])]
        return found | {"exits": codes, "wrong": wrong + self._wrong()}

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*COMMAND, "run", self.job, "--set", f"output={self.out}"],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait_for(self, moment: str, process: subprocess.Popen[bytes], seconds: float) -> None:
        until = time.monotonic() + (seconds if moment == "any" else PATIENCE_S)
        begun = self._parts()
        while time.monotonic() < until and process.poll() is None:
            # A part is created by linking a nameless file: its folder's time changes at that moment.
            if moment != "any" and self._parts() - begun > int(seconds) % 6:
                return
            time.sleep(0.002 if moment != "any" else 0.05)

    def _parts(self) -> int:
        data = self.out / "data"
        return len(list(data.iterdir())) if data.exists() else 0

    def _left(self, drivers: list[int]) -> list[int]:
        """Processes of the run that are still there after a while."""
        until = time.monotonic() + 60  # Ray's agents look for their raylet now and then
        while (left := [pid for driver in drivers for pid in _members(driver)]) and time.monotonic() < until:
            time.sleep(0.2)
        return left

    def _kill(self, process: subprocess.Popen[bytes], drivers: list[int], words: str, number: int) -> bool:
        """False where the victim is not there just now."""
        if not words:
            os.kill(process.pid, number)
            return True
        for pid in (pid for driver in drivers for pid in _members(driver)):
            if any(word in _name(pid) for word in words.split("|")):
                with contextlib.suppress(ProcessLookupError):  # it ended by itself
                    os.kill(pid, number)
                    return True
        return False

    def _wrong(self) -> list[str]:
        """Of a finished output."""
        try:
            rows = read_output(self.out)
        except Exception as error:
            return [f"torn: {error}"]
        counted = Counter((row["id"], row["index"]) for row in rows)
        wrong = [f"doubled: {row}" for row, count in counted.items() if count > 1]
        wrong += [f"lost: {row}" for row in self.expected.keys() - counted.keys()]
        wrong += [
            f"differs: {row['id']}"
            for row in rows
            if row["sha256"] != self.expected.get((row["id"], row["index"]))
        ]
        return (
            wrong
            if len(rows) == plan_rows(self.out)
            else [*wrong, f"{len(rows)} rows of {plan_rows(self.out)}"]
        )


def _unexpected(codes: list[int]) -> list[str]:
    return [f"exit codes {codes}"] if any(code not in (0, 75, 130, 143, -9) for code in codes) else []


def _name(pid: int) -> str:
    """Its command line, as Ray sets it; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def undisturbed(folder: Path) -> Chaos:
    """The job that is struck, run in peace: a small model, so that a kill costs the time of its processes,
    not of pictures."""
    settings, model = {"num_inference_steps": 4}, folder / "model"
    tiny_model().save_pretrained(model)
    values = job_values(
        write_manifest(folder / "in", ROWS), folder / "calm", rows_per_part=4, settings=settings
    )
    job = folder / "job.json"
    job.write_text(json.dumps(values | {"model": str(model)}))
    started = time.monotonic()
    subprocess.run([*COMMAND, "run", str(job)], env=ENVIRONMENT, check=True, capture_output=True)
    expected = {(row["id"], row["index"]): row["sha256"] for row in read_output(folder / "calm")}
    assert len(expected) == ROWS
    return Chaos(folder, str(job), folder / "calm", time.monotonic() - started, expected)


def strike(one: Chaos, number: int, seed: int) -> dict[str, Any]:
    """The kill of this number: victims in turn, moments by seed."""
    drawn, victim = random.Random(f"{seed} {number}"), list(VICTIMS)[number % len(VICTIMS)]
    return {"kill": number, **one.strike(victim, drawn.choice(MOMENTS), drawn.uniform(0.2, 1.0))}


def series(calm: Chaos, numbers: range, seed: int) -> Iterator[dict[str, Any]]:
    """Kill after kill of one output, until a run gets through: it is compared, and the next output begins."""
    begun = numbers[0]
    for number in numbers:
        one = replace(calm, out=calm.folder / f"out-{begun}")
        found = strike(one, number, seed)
        if found["exits"][-1] == 0 or number == numbers[-1]:
            found, begun = one.finish(found), number + 1
        yield found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first kill: goes on with an earlier series"
    )
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    calm, results = undisturbed(given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))), []
    for found in series(calm, range(given.first, given.first + given.kills), given.seed):
        results.append(found)
        print(json.dumps(found), flush=True)
    struck = sum(result["struck"] for result in results)
    wrong = [result for result in results if result["wrong"]]
    print(json.dumps({"kills": len(results), "struck": struck, "wrong": len(wrong)}))
    sys.exit(1 if wrong else 0)
