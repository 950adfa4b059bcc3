"""OUTPUT folders for the report: made by the project's own stages without Ray, or written as parts of many
rows."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from context_diffusion.core.schema import OUTPUT
from context_diffusion.outputs.finalize import close
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.report.build import rebuild
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import to_parquet
from support.finished_output import make
from support.tiny import picture

ATTACK = "\"><script>hacked=1</script><img src=x onerror=hacked=1></script><svg onload='hacked=1'>&lt;{{7*7}}"
ODD_ID = "a/b#c%2F?d é"
FAILING: dict[int, dict[str, Any]] = {
    3: {"query": "gone.png"},
    5: {"scheduler": ATTACK},
    7: {"query": "also-gone.png"},
}
CHANGES = FAILING | {1: {"prompt": ATTACK}, 2: {"id": ATTACK}, 4: {"id": ODD_ID}, 6: {"author": ATTACK}}


def finished(
    folder: Path, count: int = 24, changes: dict[int, dict[str, Any]] | None = None, **more: Any
) -> Output:
    """A whole OUTPUT with scores, as `run` leaves it."""
    changes = CHANGES if changes is None else changes
    _, output = make(folder, count, changes, **({"score": ["layout", "style"]} | more))
    told = {
        "images_per_second": 2.0,
        "seconds": 11.5,
        "occupancy": 0.93,
    }
    output.storage.replace(output.summary, json.dumps(told).encode())
    rebuild(output)
    close(output)
    return output


def parts(folder: Path, rows: list[dict[str, Any]], per_part: int, **job: Any) -> Output:
    """data/ of these rows, filled up with what every row has; a plan, no pictures' files."""
    output = Output(str(folder), Storage(deadline_s=5))
    schema = (
        OUTPUT if any("image" in row for row in rows) else pa.schema([f for f in OUTPUT if f.name != "image"])
    )
    values = {"kind": "generate", "manifest": f"{folder}/in/rows.parquet", "output": str(folder)} | job
    plan = {
        "job": values,
        "rows": len(rows),
        "manifest": [{"uri": values["manifest"]}],
        "allow": [f"{folder}/in"],
    }
    output.storage.replace(output.plan, json.dumps(plan).encode())
    for shard, begin in enumerate(range(0, len(rows), per_part)):
        filled = [
            {"index": 0, "status": "ok", "context": [], **row} for row in rows[begin : begin + per_part]
        ]
        output.storage.create(
            output.part(shard), to_parquet(pa.Table.from_pylist(filled, schema), ("image",))
        )
    return output


def png(seed: int, side: int = 64) -> bytes:
    Image.fromarray(picture(seed, side, side)).save(sink := io.BytesIO(), "PNG")
    return sink.getvalue()


def data_of(page: str) -> Any:
    """What the page's script reads."""
    [text] = [
        part.split("</script>")[0] for part in page.split('<script type="application/json" id="data">')[1:]
    ]
    return json.loads(text)


@contextmanager
def served(output: Output) -> Iterator[str]:
    """The viewer's own server, in a thread. -> its URL."""
    import socket

    import uvicorn

    from context_diffusion.outputs.report.viewer import Viewer, make_app

    viewer, listening = Viewer(output), socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(viewer), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        viewer.index.close()
        listening.close()
