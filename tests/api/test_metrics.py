"""GET /metrics: what Prometheus reads, with labels that nobody outside can make up."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from gallama import __version__
from gallama.api.app import create_app
from gallama.api.metrics import Metrics
from gallama.config import ServerConfig
from gallama.pool.gpus import Gpu
from gallama.pool.pool import WorkerPool
from gallama.pool.ticket import RequestRecord
from gallama.pool.views import InstanceState, ServedInstance, ServedModel
from gallama.wire import WorkerStatus

LABELS = ("model", "instance", "outcome", "code", "state", "version", "le", "gpu", "name")
RECORD = RequestRecord(
    request_id="r-1",
    operation="chat",
    model="mistral",
    instance=1,
    key_name="",
    outcome="completed",
    error_code="",
    entered_at=1_800_000_000,
    queue_seconds=0.2,
    first_token_seconds=1.0,
    seconds=3.0,
    tries=1,
    prompt_tokens=100,
    cached_tokens=60,
    completion_tokens=21,
    forced_tokens=8,
    accepted_draft_tokens=5,
    rejected_draft_tokens=2,
)

GPU = Gpu(index=1, name="RTX 4090", total_bytes=24_000_000_000, free_bytes=20_000_000_000)


def instance(number: int, state: InstanceState = "ready", **values: Any) -> ServedInstance:
    defaults: dict[str, Any] = {
        "progress": 1.0,
        "port": 8000 + number,
        "busy": 0,
        "served": 0,
        "capacity": 4,
        "context_length": 4096,
        "ready_since": None,
        "starts": 1,
        "process_id": None,
        "memory_bytes": 0,
        "gpus": (),
        "problem": "",
        "status": None,
    }
    return ServedInstance(number=number, state=state, **defaults | values)


def model(name: str, *instances: ServedInstance, **values: Any) -> ServedModel:
    defaults: dict[str, Any] = {
        "aliases": (),
        "model_type": "chat",
        "backend": "scripted",
        "path": "any",
        "created": 0,
        "fingerprint": "fp_1",
        "is_pinned": False,
        "ttl_seconds": None,
        "last_used": None,
        "waiting": 0,
        "waiting_tokens": 0,
    }
    return ServedModel(name=name, instances=instances, **defaults | values)


def record(**values: Any) -> RequestRecord:
    return dataclasses.replace(RECORD, **values)


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(text: str) -> dict[str, float]:
    """The figures by name and labels, as in 'gallama_queue_requests{model=mistral}'."""
    return {
        f"{sample.name}{{{_shown(sample.labels)}}}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _shown(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={labels[name]}" for name in LABELS if name in labels)


class Known:
    """The models that there are; a test changes them."""

    def __init__(self, *models: ServedModel, gpus: Sequence[Gpu] = ()) -> None:
        self.models = list(models)
        self.metrics = Metrics(lambda: self.models, lambda: gpus)

    def samples(self) -> dict[str, float]:
        return samples(self.metrics.text().decode())


@pytest.fixture
def known() -> Known:
    return Known(model("mistral", instance(1)), model("qwen", instance(2)))


class TestRequests:
    def test_each_is_counted_once_by_how_it_ended(self, known: Known) -> None:
        for values in (
            {},
            {},
            {"outcome": "failed", "error_code": "worker_died"},
            {"outcome": "cancelled", "model": "qwen"},
        ):
            known.metrics.record(record(**values))
        counts = {name: value for name, value in known.samples().items() if "requests_total" in name}
        assert counts == {
            "gallama_requests_total{model=mistral,outcome=completed,code=}": 2,
            "gallama_requests_total{model=mistral,outcome=failed,code=worker_died}": 1,
            "gallama_requests_total{model=qwen,outcome=cancelled,code=}": 1,
        }

    def test_tokens_are_counted_by_kind(self, known: Known) -> None:
        known.metrics.record(record())
        known.metrics.record(record(prompt_tokens=1, cached_tokens=0))
        assert {
            name: known.samples()[f"gallama_{name}_total{{model=mistral}}"]
            for name in (
                "prompt_tokens",
                "cached_prompt_tokens",
                "completion_tokens",
                "sampled_tokens",
                "forced_tokens",
                "drafted_tokens",
                "accepted_draft_tokens",
            )
        } == {
            "prompt_tokens": 101,
            "cached_prompt_tokens": 60,
            "completion_tokens": 42,
            "sampled_tokens": 26,
            "forced_tokens": 16,
            "drafted_tokens": 14,
            "accepted_draft_tokens": 10,
        }

    def test_times_go_into_histograms(self, known: Known) -> None:
        known.metrics.record(record())
        sums = {name: value for name, value in known.samples().items() if "_seconds_sum" in name}
        assert sums == {
            "gallama_request_seconds_sum{model=mistral}": 3.0,
            "gallama_queue_seconds_sum{model=mistral}": 0.2,
            "gallama_first_token_seconds_sum{model=mistral}": 1.0,
            "gallama_token_seconds_sum{model=mistral}": pytest.approx(0.1),
        }

    @pytest.mark.parametrize(
        ("values", "counted"),
        [
            ({"outcome": "refused", "instance": None, "first_token_seconds": None}, set()),
            ({"outcome": "cancelled", "first_token_seconds": None}, {"queue"}),
            ({"outcome": "failed"}, {"queue", "first_token"}),
            ({"completion_tokens": 1, "forced_tokens": 0}, {"request", "queue", "first_token"}),
        ],
    )
    def test_times_that_there_were_not_are_in_no_histogram(
        self, known: Known, values: dict[str, Any], counted: set[str]
    ) -> None:
        known.metrics.record(record(**values))
        found = {name for name, value in known.samples().items() if "_seconds_count" in name and value}
        assert found == {f"gallama_{name}_seconds_count{{model=mistral}}" for name in counted}


class TestLabels:
    def test_ten_thousand_made_up_models_are_one(self, known: Known) -> None:
        rng = random.Random(0)
        before = len(known.samples())
        for _ in range(10_000):
            name = rng.randbytes(8).hex()
            known.metrics.record(record(model=name, outcome="failed", error_code=name))
        after = known.samples()
        assert after["gallama_requests_total{model=other,outcome=failed,code=other}"] == 10_000
        assert len(after) < before + 100

    def test_a_made_up_error_is_other(self, known: Known) -> None:
        for number in range(1000):
            known.metrics.record(record(outcome="failed", error_code=f"code-{number}"))
        assert known.samples()["gallama_requests_total{model=mistral,outcome=failed,code=other}"] == 1000

    def test_models_that_come_and_go_leave_nothing(self, known: Known) -> None:
        stays = known.models
        for number in range(300):
            known.models = [*stays, model(f"passing-{number}")]
            known.metrics.record(
                record(model=f"passing-{number}", outcome="failed", error_code="worker_died")
            )
            known.metrics.record(record(model=f"passing-{number}"))
        names = {name for name in known.samples() if "passing" in name and "queue" not in name}
        assert names
        assert all("passing-299" in name for name in names)

    def test_a_model_that_stays_keeps_its_figures_while_others_go(self, known: Known) -> None:
        known.metrics.record(record())
        known.models = [known.models[0], model("new")]
        known.metrics.record(record(model="new"))
        known.metrics.record(record())
        assert known.samples()["gallama_requests_total{model=mistral,outcome=completed,code=}"] == 2

    def test_a_hostile_name_is_a_label_and_no_line(self) -> None:
        name = 'x"} 1\ngallama_forged{a="\\'
        hostile = Known(model(name, instance(1)))
        hostile.metrics.record(record(model=name))
        text = hostile.metrics.text().decode()
        assert "gallama_forged" not in families(text)
        labels = {sample.labels["model"] for sample in families(text)["gallama_requests"].samples}
        assert labels == {name}

    def test_who_asked_is_told_nowhere(self, known: Known) -> None:
        known.metrics.record(record(key_name="alices-key", request_id="r-secret"))
        text = known.metrics.text().decode()
        assert "alices-key" not in text
        assert "r-secret" not in text


class TestGpus:
    async def test_the_memory_of_each_is_looked_up_when_somebody_asks(self) -> None:
        pool = WorkerPool([], inventory=lambda: [GPU])
        transport = httpx.ASGITransport(create_app(pool, ServerConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            found = samples((await client.get("/metrics")).text)
        assert found["gallama_gpu_memory_bytes{gpu=1,name=RTX 4090}"] == 24_000_000_000
        assert found["gallama_gpu_memory_used_bytes{gpu=1,name=RTX 4090}"] == 4_000_000_000

    def test_a_machine_without_gpus_has_no_figures_of_any(self, known: Known) -> None:
        assert not any(name.startswith("gallama_gpu") for name in known.samples())


class TestModels:
    def test_what_waits_and_runs_is_looked_up(self) -> None:
        both = (
            instance(1, busy=3, capacity=4, memory_bytes=2**20),
            instance(2, "starting", progress=0.25),
        )
        found = Known(model("mistral", *both, waiting=7, waiting_tokens=900)).samples()
        assert found["gallama_queue_requests{model=mistral}"] == 7
        assert found["gallama_queue_tokens{model=mistral}"] == 900
        assert found["gallama_busy_requests{model=mistral,instance=1}"] == 3
        assert found["gallama_capacity_requests{model=mistral,instance=1}"] == 4
        assert found["gallama_worker_memory_bytes{model=mistral,instance=1}"] == 2**20
        assert found["gallama_load_progress{model=mistral,instance=2}"] == 0.25

    def test_the_steps_of_an_engine_are_what_its_worker_last_said(self) -> None:
        status = WorkerStatus(busy_slots=0, waiting=0, cached_tokens=0, steps=42)
        found = Known(model("mistral", instance(1, status=status), instance(2, "starting"))).samples()
        assert found["gallama_engine_steps_total{model=mistral,instance=1}"] == 42
        assert found["gallama_engine_steps_total{model=mistral,instance=2}"] == 0

    def test_an_instance_is_in_one_state(self) -> None:
        found = Known(model("mistral", instance(1), instance(2, "restarting"))).samples()
        states = {name for name, value in found.items() if "instance_state" in name and value == 1}
        assert states == {
            "gallama_instance_state{model=mistral,instance=1,state=ready}",
            "gallama_instance_state{model=mistral,instance=2,state=restarting}",
        }

    def test_loads_and_restarts_are_counters(self) -> None:
        found = Known(model("mistral", instance(1), loads=3, load_failures=1, restarts=2)).samples()
        assert found["gallama_loads_total{model=mistral}"] == 3
        assert found["gallama_load_failures_total{model=mistral}"] == 1
        assert found["gallama_restarts_total{model=mistral}"] == 2

    def test_the_gateway_tells_of_itself(self, known: Known) -> None:
        found = known.samples()
        assert found[f"gallama_build_info{{version={__version__}}}"] == 1
        assert found["process_resident_memory_bytes{}"] > 0


def test_the_document_names_each_figure_with_its_labels() -> None:
    known = Known(model("mistral", instance(1)), gpus=[GPU])
    known.metrics.record(record())
    document = (Path(__file__).parents[2] / "docs/observing.md").read_text()
    documented = {
        name: set(labels.split(", "))
        for name, labels in re.findall(r"^\| `(gallama_\w+)` \| (.*?) \|", document, re.MULTILINE)
    }
    suffixes = re.compile(r"_(bucket|count|sum)$")
    found = {
        suffixes.sub("", sample.name): sample.labels.keys() - {"le"}
        for family in families(known.metrics.text().decode()).values()
        for sample in family.samples
        if sample.name.startswith("gallama_")
    }
    assert documented == found


class TestServed:
    """By a real gateway with real workers."""

    @pytest.fixture
    def scrape(
        self, start_gateway: Callable[..., Any]
    ) -> Iterator[tuple[Any, Callable[[], dict[str, float]]]]:
        gateway = start_gateway(
            {"echo": {}, "slow": {"script": {"reply": "x" * 500, "seconds_per_token": 0.05}}},
            flags=["--strict"],
        )
        with gateway.client() as client:

            def scrape() -> dict[str, float]:
                answer = client.get("/metrics")
                assert answer.status_code == 200
                assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
                return samples(answer.text)

            yield gateway, scrape

    def test_requests_are_counted_and_made_up_names_are_not(
        self, scrape: tuple[Any, Callable[[], dict[str, float]]]
    ) -> None:
        gateway, look = scrape
        for _ in range(3):
            body = {"model": "echo", "messages": [{"role": "user", "content": "abc"}]}
            assert gateway.post(body).status_code == 200
        for number in range(50):
            body["model"] = f"made-up-{number}"
            assert gateway.post(body).status_code == 404
        found = look()
        assert found["gallama_requests_total{model=echo,outcome=completed,code=}"] == 3
        assert found["gallama_completion_tokens_total{model=echo}"] == 9
        assert found["gallama_first_token_seconds_count{model=echo}"] == 3
        assert found["gallama_loads_total{model=echo}"] == 1
        assert not any("made-up" in name for name in found)

    def test_a_stream_that_runs_is_busy_and_one_whose_client_left_is_cancelled(
        self, scrape: tuple[Any, Callable[[], dict[str, float]]]
    ) -> None:
        gateway, look = scrape
        body = {"model": "slow", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
            # Held on to: once it is gone, so is the connection.
            lines = answer.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            busy = {name: value for name, value in look().items() if "busy" in name and "slow" in name}
            assert list(busy.values()) == [1]
        gateway.wait_for("slow", busy=0)
        assert look()["gallama_requests_total{model=slow,outcome=cancelled,code=}"] == 1

    def test_a_worker_that_was_killed_is_a_restart(
        self, scrape: tuple[Any, Callable[[], dict[str, float]]]
    ) -> None:
        gateway, look = scrape
        for process_id in gateway.worker_process_ids():
            os.kill(process_id, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while look()["gallama_loads_total{model=echo}"] < 2:
            assert time.monotonic() < deadline, gateway.log()
            time.sleep(0.1)
        assert look()["gallama_restarts_total{model=echo}"] == 1
