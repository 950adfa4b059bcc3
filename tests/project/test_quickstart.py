"""jobs/quickstart.ipynb runs as it stands, each cell, in a checkout of its own."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT / "pipeline"), os.environ.get("PYTHONPATH", "")])
    )
    notebook = nbformat.read(tmp_path / "jobs" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "it is stored without what it printed"
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path / "jobs")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = [output.text for output in outputs if output.output_type == "stream"]
    assert not [text for text in printed if "\x1b" in text], "plain lines, no bar's escape codes"
    results = [
        ast.literal_eval(output.data["text/plain"])
        for output in outputs
        if output.output_type == "execute_result"
    ]
    row, summary, identical = (result for result in results if not isinstance(result, list))
    assert (row["id"], summary["ok"], summary["exit"], identical) == ("demo-00", 4, 0, True)
    assert (tmp_path / "build" / "quickstart" / "_SUCCESS").exists()
