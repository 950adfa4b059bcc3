"""Parts as Apache Spark reads them; it takes a Java runtime (`make packages`) and pyspark (`make test-full`
installs it)."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from support.finished_output import make
from support.processes import unavailable

pytestmark = pytest.mark.slow


def test_spark_reads_rows_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("java") is None:
        unavailable("no java here: `make packages` installs Debian's default-jre-headless")
    pyspark = pytest.importorskip("pyspark.sql", reason="pip install pyspark", exc_type=ImportError)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    make(tmp_path, 10, {3: {"query": "gone.png"}}, output_format="both", rows_per_part=4)
    builder = pyspark.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    spark = (
        builder.config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.memory", "512m")
        .getOrCreate()
    )
    try:
        frame = spark.read.parquet(str(tmp_path / "out" / "data"))
        rows = {row["id"]: row for row in frame.collect()}
        assert len(rows) == frame.count() == 10
        assert {row["id"]: row["error_code"] for row in rows.values() if row["status"] == "failed"} == {
            "row-003": "missing_file"
        }
        assert frame.where("status = 'ok' and author = 'person 1'").count() == 3
        for row in rows.values():
            if row["status"] == "ok":
                assert hashlib.sha256(row["image"]["bytes"]).hexdigest() == row["sha256"]
                assert [Path(path).suffix for path in row["context"]] == [".png"] * len(row["context"])
    finally:
        spark.stop()
