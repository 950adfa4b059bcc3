"""The process of the Ray driver. It reads its options from stdin, writes one line of result, and ends with
its parent.

python -m context_diffusion.cluster.driver_process RESULT_FD         stdin: options as a JSON line, later
`stop`"""

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

CHECK_S = 0.3  # between two checks of the written parts


class StopListener(threading.Thread):
    """Waits for the line `stop` on stdin: then no shard starts, and `end` is called when all shards in
    progress are written.

    If stdin ends without it, the supervisor was killed. Nothing else would then end this Ray, whose agents
    would survive, so the listener ends it and this process."""

    def __init__(self, output: Output, end: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.output = output
        self.end = end
        self._ledger: queue.Queue[Ledger] = queue.Queue()

    def on_start(self, ledger: Ledger) -> None:
        """Take the ledger of the flow that has started. From here on the supervisor handles SIGTERM.

        `ray.init` has just set a handler that would end this process, and Ray Jobs, like systemd, sends the
        signal to every process of a job that is stopped."""
        signal.signal(
            signal.SIGTERM, lambda *_: None
        )  # not SIG_IGN, which a Ray that starts here would inherit
        self._ledger.put(ledger)

    def run(self) -> None:
        """Wait for `stop`, then for the shards in progress."""
        if not any(line.strip() == "stop" for line in sys.stdin):
            end_session(os.getpid(), spared=os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)
        if not self._ledger.empty():
            ledger = self._ledger.get()
            ledger.stop()
            LOG.emit("stopping", "stop requested: the shards in progress are finished first")
            while self._unwritten(ledger):
                time.sleep(CHECK_S)
        self.end()

    def _unwritten(self, ledger: Ledger) -> bool:
        held, finished = ledger.in_progress()
        return bool(held or finished - self.output.finished())


def main() -> None:
    """Run the job that stdin names, and end the process with the exit code of its summary."""
    result = os.fdopen(int(sys.argv[1]), "w")
    values = json.loads(sys.stdin.readline())
    log = _redirect_output()
    job = GenerateJob.model_validate(values["job"])
    ending = threading.Lock()  # a run may finish at the moment when a stop is requested

    def end(summary: dict[str, Any]) -> None:
        ending.acquire()
        result.write(json.dumps(summary) + "\n")
        result.flush()
        # Ray's own threads and exit hooks may hang once its cluster is gone.
        os._exit(summary["exit"])

    output = Output(normal(job.output), Storage(job.storage_options))
    LOG.format = values["log_format"]
    LOG.job = output.root
    listener = StopListener(output, lambda: end({"exit": EXIT_TERMINATED, "error": "stopped"}))
    listener.start()
    try:
        summary = run_generate(job, Options(**values["options"]), on_start=listener.on_start)
    except ContextDiffusionError as error:
        summary = {"exit": error.exit_code, "error": str(error)}
    except Exception as error:
        summary = classify(error)
        summary["error"] += f" (log: {log})"
    end(summary)


def _redirect_output() -> str:
    """Redirect what Ray and its C++ code print to a log file, and return its path. LOG keeps the real
    stderr."""
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
