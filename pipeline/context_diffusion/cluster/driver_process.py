"""The driver's process: options in, one line of result out; it stops when it is told to, and ends with its parent.

python -m context_diffusion.cluster.driver_process RESULT_FD         stdin: a line of options as JSON, later perhaps `stop`
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from context_diffusion.cluster.driver import Options, run_generate
from context_diffusion.cluster.supervisor import end_session
from context_diffusion.core.errors import EXIT_TERMINATED, ContextDiffusionError, classify
from context_diffusion.core.event_log import LOG, console
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.uris import normal
from context_diffusion.generation.fault_ledger import Ledger
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

LOOK_S = 0.3  # between two looks at what is written


class Stopping(threading.Thread):
    """Waits for the word `stop`: then no shard begins, and `end` is called when all that were begun are written. Where
    stdin ends without it the supervisor was killed, and nobody else is left to end this Ray: its agents outlive it."""

    def __init__(self, output: Output, end: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.output, self.end = output, end
        self._ledger: queue.Queue[Ledger] = queue.Queue()

    def started(self, ledger: Ledger) -> None:
        """The flow runs. From here on SIGTERM is the supervisor's matter: `ray.init` has just set a handler that would end
        this process, and Ray Jobs, like systemd, sends the signal to every process of a job that is stopped."""
        signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN, which a Ray that is started here would inherit
        self._ledger.put(ledger)

    def run(self) -> None:
        if not any(line.strip() == "stop" for line in sys.stdin):
            end_session(os.getpid(), spared=os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)
        if not self._ledger.empty():
            ledger = self._ledger.get()
            ledger.stop()
            LOG.tell("stopping", "stopping: the shards that were begun are finished first")
            while self._unwritten(ledger):
                time.sleep(LOOK_S)
        self.end()

    def _unwritten(self, ledger: Ledger) -> bool:
        held, made = ledger.in_progress()
        return bool(held or made - self.output.finished())


def main() -> None:
    result = os.fdopen(int(sys.argv[1]), "w")
    given = json.loads(sys.stdin.readline())
    log = _redirect_noise()
    job = GenerateJob.model_validate(given["job"])
    ending = threading.Lock()  # a run may finish just when it is told to stop

    def end(summary: dict[str, Any]) -> None:
        ending.acquire()
        result.write(json.dumps(summary) + "\n")
        result.flush()
        # Ray's own threads and exit hooks may hang once its cluster is gone.
        os._exit(summary["exit"])

    output = Output(normal(job.output), Storage(job.storage_options))
    LOG.format, LOG.job = given["log_format"], output.root
    stopping = Stopping(output, lambda: end({"exit": EXIT_TERMINATED, "error": "stopped"}))
    stopping.start()
    try:
        summary = run_generate(job, Options(**given["options"]), on_start=stopping.started)
    except ContextDiffusionError as error:
        summary = {"exit": error.exit_code, "error": str(error)}
    except Exception as error:
        summary = classify(error)
        summary["error"] += f" (log: {log})"
    end(summary)


def _redirect_noise() -> str:
    """What Ray and its C++ print goes to a log file, which the log names; the log keeps the real stderr."""
    handle, path = tempfile.mkstemp(prefix="context-diffusion-", suffix=".log")
    terminal = os.dup(2)
    with suppress(OSError):
        sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ["CONTEXT_DIFFUSION_LOG"] = path
    LOG.console = console(os.fdopen(terminal, "w", buffering=1))
    return path


if __name__ == "__main__":
    main()
