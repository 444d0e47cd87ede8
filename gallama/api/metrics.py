"""GET /metrics: figures for Prometheus.

What a request came to is counted when it ends; what models do now is looked up when somebody asks. No label
is ever taken from a client: a model that is not known, or no more, is "other", and so is an error of no class
of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import get_args

from fastapi import APIRouter
from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from gallama import __version__
from gallama.errors import GallamaError
from gallama.pool.gpus import Gpu
from gallama.pool.ticket import Outcome, RequestRecord
from gallama.pool.views import InstanceState, ServedInstance, ServedModel

router = APIRouter()

OTHER = "other"

_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_QUEUE_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)

Models = Callable[[], Sequence[ServedModel]]
Gpus = Callable[[], Sequence[Gpu]]


@router.get("/metrics")
async def tell_metrics(request: Request) -> Response:
    metrics: Metrics = request.app.state.metrics
    await request.app.state.status.refresh()
    return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


class Metrics:
    """The figures of one gateway."""

    def __init__(self, models: Models, gpus: Gpus = lambda: ()) -> None:
        """
        Args:
            models: gives all that are known now.
            gpus: gives those that the gateway sees.
        """
        # Else each counter has a twin that tells when it began.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._models = models
        self._named: set[str] = set()
        """The models that have figures."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_PoolCollector(models, gpus))
        build = Info("gallama_build", "The version that runs.", registry=self._registry)
        build.info({"version": __version__})
        self._requests = self._counter("requests", "Requests that have ended.", "outcome", "code")
        self._request_seconds = self._histogram(
            "request_seconds", "From a request's coming to the end of its answer.", _REQUEST_BUCKETS
        )
        self._queue_seconds = self._histogram(
            "queue_seconds", "How long a request that reached a worker had waited.", _QUEUE_BUCKETS
        )
        self._first_token_seconds = self._histogram(
            "first_token_seconds", "From a request's coming to its first token.", _FIRST_TOKEN_BUCKETS
        )
        self._token_seconds = self._histogram(
            "token_seconds", "For each token after the first; one mean for each answer.", _TOKEN_BUCKETS
        )
        self._tokens = {name: self._counter(name, text) for name, text, _ in _TOKEN_FIGURES}

    def record(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        model = self._model_label(record.model)
        self._requests.labels(model, record.outcome, _code_label(record.error_code)).inc()
        if record.instance is not None:
            self._queue_seconds.labels(model).observe(record.queue_seconds)
        if record.first_token_seconds is not None:
            self._first_token_seconds.labels(model).observe(record.first_token_seconds)
        if record.outcome == "completed":
            self._record_answer(model, record)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)

    def _record_answer(self, model: str, record: RequestRecord) -> None:
        self._request_seconds.labels(model).observe(record.seconds)
        for name, _, tokens_of in _TOKEN_FIGURES:
            self._tokens[name].labels(model).inc(tokens_of(record))
        if record.first_token_seconds is not None and record.completion_tokens > 1:
            seconds = record.seconds - record.first_token_seconds
            self._token_seconds.labels(model).observe(seconds / (record.completion_tokens - 1))

    def _model_label(self, name: str) -> str:
        if name not in self._named:
            known = {model.name for model in self._models()}
            for gone in self._named - known:
                self._forget(gone)
            self._named &= known
            if name not in known:
                return OTHER
            self._named.add(name)
        return name

    def _forget(self, model: str) -> None:
        """Drop the figures of a model that is known no more: with others' names they would grow for ever."""
        for labels in product(_OUTCOMES, ("", OTHER, *_CODES)):
            self._requests.remove(model, *labels)
        for metric in (
            self._request_seconds,
            self._queue_seconds,
            self._first_token_seconds,
            self._token_seconds,
            *self._tokens.values(),
        ):
            metric.remove(model)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"gallama_{name}", text, ("model", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"gallama_{name}", text, ("model",), registry=self._registry, buckets=buckets)


class _PoolCollector(Collector):
    """What the models, their instances and the GPUs do in the moment of asking."""

    def __init__(self, models: Models, gpus: Gpus) -> None:
        self._models = models
        self._gpus = gpus

    def collect(self) -> Iterator[Metric]:
        models = self._models()
        for name, text, figure_of_model in _MODEL_GAUGES:
            gauge = GaugeMetricFamily(f"gallama_{name}", text, labels=("model",))
            for model in models:
                gauge.add_metric((model.name,), figure_of_model(model))
            yield gauge
        for name, text, count_of in _MODEL_COUNTERS:
            counter = CounterMetricFamily(f"gallama_{name}", text, labels=("model",))
            for model in models:
                counter.add_metric((model.name,), count_of(model))
            yield counter
        for name, text, figure_of_instance in _INSTANCE_GAUGES:
            gauge = GaugeMetricFamily(f"gallama_{name}", text, labels=("model", "instance"))
            for model, instance in _instances(models):
                gauge.add_metric((model.name, str(instance.number)), figure_of_instance(instance))
            yield gauge
        for name, text, count_of_instance in _INSTANCE_COUNTERS:
            counter = CounterMetricFamily(f"gallama_{name}", text, labels=("model", "instance"))
            for model, instance in _instances(models):
                counter.add_metric((model.name, str(instance.number)), count_of_instance(instance))
            yield counter
        yield _state_gauge(models)
        for name, text, figure_of_gpu in _GPU_GAUGES:
            gauge = GaugeMetricFamily(f"gallama_{name}", text, labels=("gpu", "name"))
            for gpu in self._gpus():
                gauge.add_metric((str(gpu.index), gpu.name), figure_of_gpu(gpu))
            yield gauge


def _state_gauge(models: Sequence[ServedModel]) -> Metric:
    text = "1 for the state that an instance is in, 0 for the others."
    gauge = GaugeMetricFamily("gallama_instance_state", text, labels=("model", "instance", "state"))
    for model, instance in _instances(models):
        for state in _STATES:
            gauge.add_metric((model.name, str(instance.number), state), float(instance.state == state))
    return gauge


def _instances(models: Sequence[ServedModel]) -> Iterator[tuple[ServedModel, ServedInstance]]:
    for model in models:
        for instance in model.instances:
            yield model, instance


def _code_label(code: str) -> str:
    return code if not code or code in _CODES else OTHER


def _codes_of(error: type[GallamaError]) -> set[str]:
    return {error.code}.union(*(_codes_of(kind) for kind in error.__subclasses__()))


_CODES = frozenset(_codes_of(GallamaError))
_OUTCOMES: tuple[str, ...] = get_args(Outcome)
_STATES: tuple[str, ...] = get_args(InstanceState)

_TOKEN_FIGURES: Sequence[tuple[str, str, Callable[[RequestRecord], int]]] = (
    ("prompt_tokens", "Tokens of the prompts of completed requests.", lambda record: record.prompt_tokens),
    ("cached_prompt_tokens", "Those of them that were in the cache.", lambda record: record.cached_tokens),
    ("completion_tokens", "Tokens of whole answers.", lambda record: record.completion_tokens),
    (
        "sampled_tokens",
        "Those of them that the model chose.",
        lambda record: max(record.completion_tokens - record.forced_tokens, 0),
    ),
    ("forced_tokens", "Those of them that a grammar forced.", lambda record: record.forced_tokens),
    (
        "drafted_tokens",
        "Tokens that were guessed ahead.",
        lambda record: record.accepted_draft_tokens + record.rejected_draft_tokens,
    ),
    (
        "accepted_draft_tokens",
        "Guesses that stand in an answer.",
        lambda record: record.accepted_draft_tokens,
    ),
)
_MODEL_GAUGES: Sequence[tuple[str, str, Callable[[ServedModel], float]]] = (
    ("queue_requests", "Requests that wait for a slot.", lambda model: model.waiting),
    ("queue_tokens", "Estimated prompt tokens of those.", lambda model: model.waiting_tokens),
)
_MODEL_COUNTERS: Sequence[tuple[str, str, Callable[[ServedModel], float]]] = (
    ("loads", "How often an instance has become ready.", lambda model: model.loads),
    ("load_failures", "How often a load ended in an error.", lambda model: model.load_failures),
    ("restarts", "How often a worker died or hung, and was started again.", lambda model: model.restarts),
)
_INSTANCE_GAUGES: Sequence[tuple[str, str, Callable[[ServedInstance], float]]] = (
    ("busy_requests", "Requests that are being answered.", lambda instance: instance.busy),
    ("capacity_requests", "Requests that may be answered at once.", lambda instance: instance.capacity),
    ("load_progress", "The part of the model that is loaded, 0 to 1.", lambda instance: instance.progress),
    ("worker_memory_bytes", "Resident memory of the process.", lambda instance: instance.memory_bytes),
)
_GPU_GAUGES: Sequence[tuple[str, str, Callable[[Gpu], float]]] = (
    ("gpu_memory_bytes", "Memory that a GPU has.", lambda gpu: gpu.total_bytes),
    (
        "gpu_memory_used_bytes",
        "What of it all processes of the machine use.",
        lambda gpu: gpu.total_bytes - gpu.free_bytes,
    ),
)
_INSTANCE_COUNTERS: Sequence[tuple[str, str, Callable[[ServedInstance], float]]] = (
    (
        "engine_steps",
        "Forward passes since the process began.",
        lambda instance: 0 if instance.status is None else instance.status.steps,
    ),
)
