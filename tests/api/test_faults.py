"""What a gateway does when a worker dies, and what is left when the gateway dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SLOW = {"script": {"reply": "x" * 1000, "seconds_per_token": 0.02}}


def wait_until_gone(process_ids: list[int], seconds: float = 5) -> None:
    assert process_ids
    deadline = time.monotonic() + seconds
    while alive := [each for each in process_ids if _lives(each)]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.02)


def _lives(process_id: int) -> bool:
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(process_id)], capture_output=True, text=True)
    return listing.stdout.strip()[:1] not in ("", "Z")


def start_stream(client: httpx.Client) -> httpx.Response:
    answer = client.send(
        client.build_request("POST", "/v1/chat/completions", json={**BODY, "stream": True}), stream=True
    )
    assert answer.status_code == 200
    return answer


def read_to_the_end(lines: Iterator[str]) -> tuple[list[str], bool]:
    """What a stream still says, and whether the connection ended before its body did."""
    data: list[str] = []
    try:
        for line in lines:
            data += [line.removeprefix("data: ")] if line else []
    except httpx.RemoteProtocolError:
        return data, True
    return data, False


def test_a_worker_killed_in_the_middle_is_an_error_event_and_then_answers_again(start_gateway: Any) -> None:
    gateway = start_gateway({"m": SLOW})
    (worker,) = gateway.worker_process_ids()
    with gateway.client() as client:
        answer = start_stream(client)
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(worker, signal.SIGKILL)
        data, was_cut = read_to_the_end(lines)
        answer.close()
    assert json.loads(data[-1])["error"]["code"] == "worker_died"
    assert was_cut
    assert gateway.post({**BODY, "max_tokens": 3}).json()["choices"][0]["message"]["content"] == "xxx"
    assert gateway.worker_process_ids() != [worker]


def test_a_worker_killed_before_the_first_token_is_an_error_of_a_whole_answer(start_gateway: Any) -> None:
    gateway = start_gateway({"m": {"script": {"die_after_tokens": 0}}})
    answer = gateway.post(BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_died")
    gateway.wait_for("m", states=["ready"])


def test_a_worker_killed_while_idle_is_replaced(start_gateway: Any) -> None:
    gateway = start_gateway({"m": {}})
    (worker,) = gateway.worker_process_ids()
    os.kill(worker, signal.SIGKILL)
    assert gateway.post(BODY).json()["choices"][0]["message"]["content"] == "hi"
    assert gateway.worker_process_ids() != [worker]


def test_a_killed_gateway_leaves_no_worker(start_gateway: Any) -> None:
    models = {"ready": {}, "loading": {"script": {"seconds_to_load": 60}}}
    gateway = start_gateway(models, wait=False)
    gateway.wait_for("ready", states=["ready"])
    workers = gateway.worker_process_ids()
    assert len(workers) == 2
    gateway.process.kill()
    wait_until_gone(workers)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_gateway_that_is_asked_to_end_ends_its_workers(
    start_gateway: Any, signal_number: signal.Signals
) -> None:
    gateway = start_gateway({"m": {}})
    workers = gateway.worker_process_ids()
    gateway.process.send_signal(signal_number)
    assert gateway.process.wait(5) == 0
    wait_until_gone(workers)
    assert "Traceback" not in gateway.log()


def test_a_running_stream_may_end_before_the_gateway_does(start_gateway: Any) -> None:
    gateway = start_gateway({"m": {"script": {"reply": "x" * 20, "seconds_per_token": 0.05}}})
    with gateway.client() as client:
        answer = start_stream(client)
        gateway.process.send_signal(signal.SIGINT)
        assert "data: [DONE]" in list(answer.iter_lines())
        answer.close()
    assert gateway.process.wait(5) == 0


def test_what_runs_for_longer_than_it_may_is_told_that_the_server_ends(start_gateway: Any) -> None:
    gateway = start_gateway({"m": SLOW}, server={"drain_seconds": 0.5})
    with gateway.client() as client, ThreadPoolExecutor(1) as threads:
        whole = threads.submit(gateway.post, BODY)
        gateway.wait_for("m", busy=1)
        stream = start_stream(client)
        gateway.process.send_signal(signal.SIGTERM)
        events, _ = read_to_the_end(stream.iter_lines())
        assert json.loads(events[-1])["error"]["code"] == "model_unloaded"
        assert whole.result().json()["error"]["code"] == "model_unloaded"
        stream.close()
    assert gateway.process.wait(5) == 0
    assert "ERROR" not in gateway.log()


def test_a_second_ctrl_c_ends_running_streams_at_once(start_gateway: Any) -> None:
    gateway = start_gateway({"m": SLOW})
    workers = gateway.worker_process_ids()
    with gateway.client() as client:
        answer = start_stream(client)
        gateway.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert gateway.process.poll() is None
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.process.wait(3) == 0
        with pytest.raises(httpx.TransportError):
            answer.read()
        answer.close()
    wait_until_gone(workers)
    assert "Traceback" not in gateway.log()


def test_a_model_that_cannot_be_loaded_ends_the_gateway_with_the_reason(start_gateway: Any) -> None:
    gateway = start_gateway({"m": {"script": {"fail_at_load": "The file is broken."}}}, wait=False)
    assert gateway.process.wait(10) == 1
    assert "The file is broken." in gateway.log()
    assert "Traceback" not in gateway.log()


def test_one_model_that_cannot_be_loaded_does_not_stop_another(start_gateway: Any) -> None:
    bad = {"script": {"fail_at_load": "The file is broken."}}
    gateway = start_gateway({"m": {}, "bad": bad}, wait=False)
    gateway.wait_for("bad", states=["failed"])
    gateway.wait_for("m", states=["ready"])
    answer = gateway.post({**BODY, "model": "bad"})
    assert answer.status_code == 503
    assert "The file is broken." in answer.json()["error"]["message"]
    assert gateway.post(BODY).status_code == 200
    with gateway.client() as client:
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200


def test_models_on_demand_are_loaded_by_their_first_request(start_gateway: Any) -> None:
    gateway = start_gateway({"a": {}, "b": {}}, load=[])
    assert gateway.worker_process_ids() == []
    with gateway.client() as client:
        models = {model["id"]: model["states"] for model in client.get("/v1/models").json()["data"]}
    assert models["a"] == models["b"] == ["unloaded"]
    assert gateway.post({**BODY, "model": "b"}).json()["model"] == "b"
    assert len(gateway.worker_process_ids()) == 1


def test_a_port_in_use_is_one_clear_line_before_anything_is_loaded(start_gateway: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "gallama", "serve", "--port", str(port)]
        process = subprocess.run(
            [*command, "-id", "model_id=any backend=scripted"], capture_output=True, text=True, timeout=20
        )
    assert process.returncode == 2
    assert str(port) in process.stderr
    assert "--port" in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
