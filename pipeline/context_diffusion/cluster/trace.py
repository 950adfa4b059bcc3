"""A run as a trace, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector: a span for each shard, in it one for each stage.

The other OTEL_* variables hold too: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS. OTLP over HTTP.
Unset, nothing is imported. The stages' times are those of the machines that ran them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import format_exception
from types import TracebackType
from typing import Any, Self

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.event_log import LOG
from context_diffusion.core.schema import STAGES

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
NANO = 1_000_000_000


class Trace:
    """Whatever goes wrong with it ends no run: that is told once, and the run goes on without a trace.

    Raises ConfigError where a collector is named and the extra `otel` is missing."""

    def __init__(self, output: str) -> None:
        self.output, self._provider = output, None
        if any(os.environ.get(name) for name in ENDPOINTS):
            with self._harmless():
                self._provider = _provider()

    def __enter__(self) -> Self:
        with self._harmless():
            if self._provider:
                from opentelemetry.trace import set_span_in_context

                self._tracer = self._provider.get_tracer("context_diffusion")
                self._run = self._tracer.start_span("run", attributes={"output": _plain(self.output)})
                self._within = set_span_in_context
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._harmless():
            if self._provider:
                if error:
                    told = {"exception.message": str(error), "exception.stacktrace": "".join(format_exception(error))}
                    self._run.record_exception(error, {name: _plain(text) for name, text in told.items()})
                self._run.end()
                self._provider.shutdown()  # what is left is sent

    def add(self, counts: dict[str, Any]) -> None:
        """A written shard: a row of schema.WRITTEN."""
        with self._harmless():
            if self._provider:
                self._add(counts)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            self._provider = None
            message = f"the trace is left out: {type(error).__name__}: {error}"
            LOG.tell("warning", f"warning: {message}", "warning", message=message)

    def _add(self, counts: dict[str, Any]) -> None:
        spans = {stage: counts[f"{stage}_span"] for stage in STAGES}
        times = {stage: (int(one["began"] * NANO), int((one["began"] + one["seconds"]) * NANO)) for stage, one in spans.items()}
        told = {name: counts[name] for name in ("shard", "rows", "failed", "images", "bytes")}
        began, ended = min(first for first, _ in times.values()), max(last for _, last in times.values())
        shard = self._tracer.start_span("shard", self._within(self._run), attributes=told, start_time=began)
        for failure in counts["failures"]:
            shard.add_event("row_failed", {name: _plain(text) for name, text in failure.items()}, ended)
        for stage, (first, last) in times.items():
            self._tracer.start_span(stage, self._within(shard), start_time=first).end(last)
        shard.end(ended)


def _plain(text: str | None) -> str:
    """What UTF-8 can hold: an id or a path may have surrogates in it, with which all spans of their batch would be lost."""
    return (text or "").encode("utf-8", "backslashreplace").decode()


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
