"""Traces as a collector gets them: OTLP over HTTP on this machine, of shards that were really made."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from context_diffusion.cluster.trace import ENDPOINTS, Trace
from context_diffusion.core.errors import ConfigError
from support.finished_output import make

EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """What was sent to it: the path, and the resource's spans."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    sent: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            sent.extend((self.path, resource) for resource in request.resource_spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield sent
    server.shutdown()
    server.server_close()


def attributes(values: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in values}


def test_a_run_is_a_span_with_its_shards_and_their_stages_in_it(tmp_path: Path, collector: list[tuple[str, Any]]) -> None:
    heard: list[dict[str, Any]] = []
    make(tmp_path, 8, {5: {"scheduler": "magic"}}, written=heard, rows_per_part=4)
    with Trace("/out") as trace:
        for one in heard:
            trace.add(one)
    assert {path for path, _ in collector} == {"/v1/traces"}
    assert {attributes(sent.resource.attributes)["service.name"] for _, sent in collector} == {"context-diffusion"}
    spans = [span for _, sent in collector for scope in sent.scope_spans for span in scope.spans]
    assert len({span.trace_id for span in spans}) == 1
    [run] = [span for span in spans if span.name == "run"]
    assert (run.parent_span_id, attributes(run.attributes)) == (b"", {"output": "/out"})
    shards = sorted((span for span in spans if span.name == "shard"), key=lambda span: attributes(span.attributes)["shard"])
    assert [span.parent_span_id for span in shards] == [run.span_id] * 2
    assert [attributes(span.attributes)["failed"] for span in shards] == [0, 1]
    [event] = shards[1].events
    assert (event.name, attributes(event.attributes)["id"]) == ("row_failed", "row-005")
    for shard, one in zip(shards, heard, strict=True):
        stages = {span.name: span for span in spans if span.parent_span_id == shard.span_id}
        assert set(stages) == {"load", "generate", "write"}
        for name, span in stages.items():
            assert shard.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= shard.end_time_unix_nano
            seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
            assert seconds == pytest.approx(one[f"{name}_span"]["seconds"], abs=1e-5)


def test_a_run_that_breaks_off_is_sent_too(collector: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "nightly")
    with pytest.raises(RuntimeError, match="gone"), Trace("/out"):
        raise RuntimeError("the cluster is gone")
    [(_, sent)] = collector
    assert attributes(sent.resource.attributes)["service.name"] == "nightly"
    [run] = sent.scope_spans[0].spans
    assert attributes(run.events[0].attributes)["exception.message"] == "the cluster is gone"


def test_ids_and_errors_that_utf_8_cannot_hold_are_sent_escaped(tmp_path: Path, collector: list[tuple[str, Any]]) -> None:
    heard: list[dict[str, Any]] = []
    make(tmp_path, 4, {1: {"scheduler": "magic"}}, written=heard)
    [failure] = heard[0]["failures"]
    failure["id"] = "row-\udc80"  # of a file name that is no UTF-8
    trace = Trace("/out/jos\xe9-\udc80")
    with suppress(RuntimeError), trace:
        trace.add(heard[0])
        raise RuntimeError("/out/\udc80 is gone")
    spans = {span.name: span for _, sent in collector for scope in sent.scope_spans for span in scope.spans}
    assert attributes(spans["run"].attributes) == {"output": "/out/jos\xe9-\\udc80"}
    assert attributes(spans["run"].events[0].attributes)["exception.message"] == "/out/\\udc80 is gone"
    assert attributes(spans["shard"].events[0].attributes)["id"] == "row-\\udc80"


@pytest.mark.parametrize(("variable", "value"), [("OTEL_BSP_MAX_QUEUE_SIZE", "-1"), ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")])
def test_a_trace_that_cannot_be_made_is_told_and_the_run_goes_on(
    tmp_path: Path,
    collector: list[tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv(variable, value)
    heard: list[dict[str, Any]] = []
    make(tmp_path, 4, written=heard)
    with Trace("/out") as trace:
        trace.add(heard[0])
    assert collector == []
    assert "the trace is left out: ValueError: " in capsys.readouterr().err


def test_a_shard_whose_counts_a_trace_cannot_hold_ends_no_run(
    collector: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with Trace("/out") as trace:
        trace.add({"shard": 0})
        trace.add({"shard": 1})
    assert capsys.readouterr().err.count("the trace is left out: KeyError") == 1


def test_without_a_collector_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with Trace("/out") as trace:
        trace.add({})


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with pytest.raises(ConfigError, match=r"pip install 'context-diffusion\[otel\]'"):
        Trace("/out")
