"""A run as a trace, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector: a span for each shard, in it one for each stage.

The other OTEL_* variables hold too: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS. OTLP over HTTP.
Unset, nothing is imported. The stages' times are those of the machines that ran them.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

from context_diffusion.errors import ConfigError
from context_diffusion.schema import STAGES

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
NANO = 1_000_000_000


class Trace:
    """Raises ConfigError where a collector is named and the extra `otel` is missing."""

    def __init__(self, output: str) -> None:
        self.output = output
        self._provider = _provider() if any(os.environ.get(name) for name in ENDPOINTS) else None

    def __enter__(self) -> Self:
        if self._provider:
            from opentelemetry.trace import set_span_in_context

            self._tracer = self._provider.get_tracer("context_diffusion")
            self._run = self._tracer.start_span("run", attributes={"output": self.output})
            self._within = set_span_in_context
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._provider:
            if error:
                self._run.record_exception(error)
            self._run.end()
            self._provider.shutdown()  # what is left is sent

    def add(self, counts: dict[str, Any]) -> None:
        """A written shard: a row of schema.WRITTEN."""
        if not self._provider:
            return
        spans = {stage: counts[f"{stage}_span"] for stage in STAGES}
        times = {stage: (int(one["began"] * NANO), int((one["began"] + one["seconds"]) * NANO)) for stage, one in spans.items()}
        told = {name: counts[name] for name in ("shard", "rows", "failed", "images", "bytes")}
        began, ended = min(first for first, _ in times.values()), max(last for _, last in times.values())
        shard = self._tracer.start_span("shard", self._within(self._run), attributes=told, start_time=began)
        for failure in counts["failures"]:
            shard.add_event("row_failed", failure, ended)
        for stage, (first, last) in times.items():
            self._tracer.start_span(stage, self._within(shard), start_time=first).end(last)
        shard.end(ended)


def _provider() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"{ENDPOINTS[0]} is set, but {error.name} is missing: pip install 'context-diffusion[otel]'") from error
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {SERVICE_NAME: "context-diffusion"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
