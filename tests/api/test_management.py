"""Models are loaded, listed and unloaded over HTTP, by those who may."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gallama.api import management
from gallama.api.auth import is_management
from gallama.api.management_paths import MANAGEMENT_PATHS

LOAD_SECONDS = 30


def scripted(name: str, *, spec: dict[str, Any] | None = None, **script: Any) -> dict[str, Any]:
    """What to add: a model that plays a script."""
    return {
        "model_id": "any",
        "model_name": name,
        "backend": "scripted",
        "backend_extra_args": script,
        **(spec or {}),
    }


def get(gateway: Any, path: str, **options: Any) -> Any:
    with gateway.client(**options) as client:
        answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(gateway: Any, path: str, body: object, **options: Any) -> httpx.Response:
    with gateway.client(**options) as client:
        answer: httpx.Response = client.post(
            path, content=json.dumps(body), headers={"content-type": "application/json"}
        )
    return answer


def ended(gateway: Any, task_id: str) -> dict[str, Any]:
    """The task, once it has ended."""
    deadline = time.monotonic() + LOAD_SECONDS
    while (task := get(gateway, f"/task_status/{task_id}"))["status"] in ("queued", "loading"):
        assert time.monotonic() < deadline, task
        time.sleep(0.05)
    return dict(task)


def add(gateway: Any, *specs: dict[str, Any]) -> dict[str, Any]:
    """Loads models; the task, once it has ended."""
    answer = post(gateway, "/add_model", list(specs))
    assert answer.status_code == 202, answer.text
    return ended(gateway, answer.json()["task_id"])


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


def assert_log_is_sound(gateway: Any) -> None:
    """Nobody has begun a line of the log with words of his own, or sent the terminal a command."""
    lines = gateway.log().split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [line for line in lines if line.startswith(("forged", "2026-01-01 ERROR forged"))] == []


def names(listing: dict[str, Any]) -> list[str]:
    return [model["name"] for model in listing["models"]]


def ask(gateway: Any, model: str, text: str = "hello") -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    answer: httpx.Response = gateway.post(body)
    return answer


def content_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, serving_gateway: Any) -> Iterator[Any]:
    """Has two models in its config file."""
    models = {"base": {}, "spare": {"aliases": ["other"]}}
    with serving_gateway(tmp_path_factory.mktemp("shared"), models, load=[], flags=["--strict"]) as started:
        yield started


@pytest.fixture
def gateway(shared: Any) -> Iterator[Any]:
    """The shared one with `base` loaded; what a test loads beside it is unloaded at its end."""
    assert content_of(ask(shared, "base")) == "hello"
    yield shared
    for name in names(get(shared, "/list_loaded_models")):
        if name != "base":
            post(shared, "/remove_model", {"model_name": name})


class TestLoading:
    def test_a_model_is_loaded_asked_and_unloaded(self, gateway: Any) -> None:
        task = add(gateway, scripted("new", reply="at your service"))
        assert (task["status"], task["progress"], task["error"]) == ("completed", 1, None)
        assert [(model["name"], model["status"]) for model in task["models"]] == [("new", "completed")]
        assert content_of(ask(gateway, "new")) == "at your service"
        workers = gateway.worker_process_ids()
        answer = post(gateway, "/remove_model", {"model_name": "new"})
        assert answer.status_code == 200, answer.text
        (removed,) = answer.json()["removed"]
        assert removed["name"] == "new"
        assert removed["instance"] == task["models"][0]["instance"]
        assert removed["memory_freed_bytes"] > 2**20
        assert removed["verified"] is True
        assert removed["cut_requests"] == 0
        assert ask(gateway, "new").status_code == 404
        assert "new" not in names(get(gateway, "/list_models"))
        assert len(gateway.worker_process_ids()) == len(workers) - 1

    def test_one_call_loads_several_models(self, gateway: Any) -> None:
        task = add(gateway, scripted("a", reply="A"), scripted("b", reply="B"))
        assert [model["name"] for model in task["models"]] == ["a", "b"]
        assert [content_of(ask(gateway, name)) for name in ("a", "b")] == ["A", "B"]

    def test_a_spec_alone_is_taken_as_well(self, gateway: Any) -> None:
        answer = post(gateway, "/v1/add_model", scripted("alone", reply="hm"))
        assert answer.status_code == 202
        assert ended(gateway, answer.json()["task_id"])["status"] == "completed"
        assert content_of(ask(gateway, "alone")) == "hm"

    def test_a_model_of_the_config_file_is_loaded_by_its_name(self, gateway: Any) -> None:
        assert add(gateway, {"model_id": "spare"})["models"][0]["name"] == "spare"
        assert content_of(ask(gateway, "other", "echo")) == "echo"

    def test_a_failed_load_tells_the_workers_own_reason(self, gateway: Any) -> None:
        task = add(gateway, scripted("bad", fail_at_load="the llama is asleep"))
        assert task["status"] == "failed"
        assert task["models"][0]["status"] == "failed"
        assert "the llama is asleep" in task["error"]
        assert task["models"][0]["error"] == task["error"]

    def test_a_worker_that_dies_while_it_loads_is_told_of(self, gateway: Any) -> None:
        task = add(gateway, scripted("dying", die_at_load=True))
        assert task["status"] == "failed"
        assert "ended with exit code 3" in task["error"]

    def test_what_is_being_loaded_is_not_loaded_twice(self, gateway: Any) -> None:
        spec = scripted("slow", seconds_to_load=3)
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: post(gateway, "/add_model", spec), range(8)))
        assert {answer.status_code for answer in answers} == {202}
        (task_id,) = {answer.json()["task_id"] for answer in answers}
        assert ended(gateway, task_id)["status"] == "completed"
        slow = next(model for model in get(gateway, "/list_models")["models"] if model["name"] == "slow")
        assert slow["states"] == ["ready"]

    def test_the_same_spec_again_is_a_second_instance(self, gateway: Any) -> None:
        add(gateway, scripted("twin"))
        add(gateway, scripted("twin"))
        twin = next(model for model in get(gateway, "/list_models")["models"] if model["name"] == "twin")
        assert twin["states"] == ["ready", "ready"]

    def test_the_name_of_what_is_loaded_is_one_more_instance_with_the_same_settings(
        self, gateway: Any
    ) -> None:
        add(gateway, scripted("named", reply="the same", spec={"max_seq_len": 2048}))
        task = add(gateway, {"model_id": "named"})
        assert (task["status"], task["models"][0]["name"]) == ("completed", "named")
        named = next(model for model in get(gateway, "/list_models")["models"] if model["name"] == "named")
        assert [instance["context_length"] for instance in named["instances"]] == [2048, 2048]
        post(gateway, "/stop_model_by_port", {"port": named["instances"][0]["port"]})
        assert content_of(ask(gateway, "named", "hi")) == "the same"

    def test_a_name_that_means_another_model_is_refused(self, gateway: Any) -> None:
        answer = post(gateway, "/add_model", scripted("base", reply="I am another"))
        assert refusal(answer)[:2] == (400, "invalid_value")
        assert content_of(ask(gateway, "base", "still me")) == "still me"

    def test_tasks_are_listed_the_newest_last(self, gateway: Any) -> None:
        first = add(gateway, scripted("one"))
        second = add(gateway, scripted("two", fail_at_load="no"))
        told = [
            (task["task_id"], task["status"])
            for task in get(gateway, "/loading_status")["tasks"]
            if task["task_id"] in (first["task_id"], second["task_id"])
        ]
        assert told == [(first["task_id"], "completed"), (second["task_id"], "failed")]

    @pytest.mark.slow
    def test_fifty_models_at_once_are_all_loaded_while_others_are_answered(self, gateway: Any) -> None:
        answer = post(gateway, "/add_model", [scripted(f"m{number}") for number in range(50)])
        assert answer.status_code == 202, answer.text
        assert content_of(ask(gateway, "base", "still here")) == "still here"
        task_id = answer.json()["task_id"]
        deadline = time.monotonic() + 240
        while (task := get(gateway, f"/task_status/{task_id}"))["status"] in ("queued", "loading"):
            assert time.monotonic() < deadline, task
            time.sleep(1)
        assert task["status"] == "completed", task
        assert content_of(ask(gateway, "m49", "me too")) == "me too"


SEED_PAYLOAD: list[dict[str, Any]] = [
    {"model_id": "qwen2-72B", "gpus": [22, 22, 4, 0], "cache_size": 32768},
    {"model_id": "gemma2-9b", "gpus": [0, 0, 0, 20], "cache_size": 32768},
    {
        "model_id": "/home/remichu/work/ML/model/multilingual-e5-large-instruct",
        "gpus": [0, 0, 0, 1],
        "model_type": "embedding",
    },
]


class TestThePayloadOfTheReadme:
    @pytest.fixture
    def gateway(self, start_gateway: Any) -> Any:
        models = {spec["model_id"]: {"model_type": spec.get("model_type", "llm")} for spec in SEED_PAYLOAD}
        return start_gateway(models, load=[])

    def test_its_models_are_loaded_as_written(self, gateway: Any) -> None:
        task = add(gateway, *SEED_PAYLOAD)
        assert task["status"] == "completed", task
        names_of_it = [spec["model_id"] for spec in SEED_PAYLOAD]
        assert [model["name"] for model in task["models"]] == names_of_it
        assert content_of(ask(gateway, "gemma2-9b", "hi")) == "hi"
        answer = post(gateway, "/v1/embeddings", {"model": names_of_it[2], "input": "hi"})
        assert len(answer.json()["data"]) == 1, answer.text

    def test_nothing_of_it_is_loaded_where_one_of_them_is_not_there(self, start_gateway: Any) -> None:
        gateway = start_gateway({"qwen2-72B": {}, "gemma2-9b": {}}, load=[])
        answer = post(gateway, "/add_model", SEED_PAYLOAD)
        assert refusal(answer)[2] == "[2].model_id"
        assert get(gateway, "/loading_status") == {"tasks": []}
        assert gateway.worker_process_ids() == []


class TestUnloading:
    def test_an_answer_that_streams_is_ended_first(self, gateway: Any) -> None:
        add(gateway, scripted("slow", reply="x" * 60, seconds_per_token=0.03))
        body = {"model": "slow", "stream": True, "messages": [{"role": "user", "content": "go"}]}
        with (
            gateway.client() as client,
            client.stream("POST", "/v1/chat/completions", json=body) as stream,
            ThreadPoolExecutor() as threads,
        ):
            lines = stream.iter_lines()
            next(line for line in lines if '"x"' in line)
            removal = threads.submit(post, gateway, "/remove_model", {"model_name": "slow"})
            rest = list(lines)
            answer = removal.result()
        assert "data: [DONE]" in rest
        assert not any('"error"' in line for line in rest)
        assert [removed["cut_requests"] for removed in answer.json()["removed"]] == [0]

    def test_an_answer_that_takes_longer_than_it_may_is_cut_and_told_so(self, start_gateway: Any) -> None:
        gateway = start_gateway(
            {"slow": {"script": {"reply": "x" * 4000, "seconds_per_token": 0.02}}},
            server={"drain_seconds": 0.3},
        )
        body = {"model": "slow", "stream": True, "messages": [{"role": "user", "content": "go"}]}
        with (
            gateway.client() as client,
            client.stream("POST", "/v1/chat/completions", json=body) as stream,
            ThreadPoolExecutor() as threads,
        ):
            lines = stream.iter_lines()
            next(line for line in lines if '"x"' in line)
            removal = threads.submit(post, gateway, "/remove_model", {"model_name": "slow"})
            error = next(line for line in lines if '"error"' in line)
            answer = removal.result()
        assert [removed["cut_requests"] for removed in answer.json()["removed"]] == [1]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "model_unloaded"

    def test_a_model_of_the_config_file_stays_known(self, gateway: Any) -> None:
        assert len(post(gateway, "/remove_model", {"model_id": "base"}).json()["removed"]) == 1
        base = next(model for model in get(gateway, "/list_models")["models"] if model["name"] == "base")
        assert not base["loaded"]
        assert content_of(ask(gateway, "base", "back again")) == "back again"

    @pytest.mark.parametrize("body", [{"model_id": "other"}, {"model_name": "other"}, {"model_id": "spare"}])
    def test_a_model_is_known_by_its_names_and_aliases(self, gateway: Any, body: dict[str, str]) -> None:
        add(gateway, {"model_id": "spare"})
        removed = post(gateway, "/remove_model", body).json()["removed"]
        assert [each["name"] for each in removed] == ["spare"]

    def test_a_model_is_known_by_the_path_it_was_loaded_by(self, gateway: Any, tmp_path: Path) -> None:
        path = str(tmp_path / "play")
        add(gateway, scripted("player", spec={"model_id": path}))
        removed = post(gateway, "/remove_model", {"model_id": path}).json()["removed"]
        assert [each["name"] for each in removed] == ["player"]

    def test_a_path_that_two_models_were_loaded_by_is_refused(self, gateway: Any, tmp_path: Path) -> None:
        path = str(tmp_path / "play")
        add(gateway, scripted("p", spec={"model_id": path}), scripted("q", spec={"model_id": path}))
        answer = post(gateway, "/remove_model", {"model_id": path})
        assert refusal(answer) == (400, "invalid_value", "model_id")
        assert "p, q" in answer.json()["error"]["message"]

    def test_what_is_not_loaded_gives_nothing_back(self, gateway: Any) -> None:
        assert post(gateway, "/remove_model", {"model_name": "spare"}).json() == {"removed": []}

    def test_another_model_is_never_unloaded_in_place_of_an_unknown_one(self, start_gateway: Any) -> None:
        gateway = start_gateway({"only": {}})
        assert content_of(ask(gateway, "gpt-4", "it answers to any name")) == "it answers to any name"
        assert refusal(post(gateway, "/remove_model", {"model_id": "gpt-4"})) == (
            404,
            "model_not_found",
            "model_id",
        )
        assert gateway.state("only")["states"] == ["ready"]

    def test_what_is_still_being_loaded_is_given_up(self, gateway: Any) -> None:
        spec = scripted("endless", seconds_to_load=60)
        task_id = post(gateway, "/add_model", spec).json()["task_id"]
        assert post(gateway, "/remove_model", {"model_name": "endless"}).status_code == 200
        task = get(gateway, f"/task_status/{task_id}")
        assert task["status"] == "failed"
        assert "unloaded before it was loaded" in task["error"]
        assert "endless" not in names(get(gateway, "/list_models"))

    def test_who_removes_a_model_at_the_same_time_as_others_hears_of_the_same_end(self, gateway: Any) -> None:
        add(gateway, scripted("popular"))
        with ThreadPoolExecutor(6) as threads:
            answers = list(
                threads.map(lambda _: post(gateway, "/remove_model", {"model_name": "popular"}), range(6))
            )
        told = [answer.json()["removed"] for answer in answers if answer.status_code == 200]
        assert told
        assert {answer.status_code for answer in answers} <= {200, 404}  # 404: it came when all was over
        assert {removed["instance"] for each in told for removed in each} == {told[0][0]["instance"]}
        assert "popular" not in names(get(gateway, "/list_models"))

    def test_one_instance_is_stopped_by_its_port(self, gateway: Any) -> None:
        add(gateway, scripted("twin"), scripted("twin"))
        twin = next(model for model in get(gateway, "/list_models")["models"] if model["name"] == "twin")
        first, second = twin["instances"]
        assert first["port"] != second["port"]
        answer = post(gateway, "/stop_model_by_port", {"port": second["port"]})
        assert [removed["instance"] for removed in answer.json()["removed"]] == [second["instance"]]
        assert content_of(ask(gateway, "twin", "one is left")) == "one is left"
        assert refusal(post(gateway, "/stop_model_by_port", {"port": second["port"]}))[:2] == (
            404,
            "instance_not_found",
        )


class TestListing:
    def test_every_known_model_is_listed_with_its_instances(self, gateway: Any) -> None:
        listing = get(gateway, "/list_models")
        assert names(listing) == ["base", "spare", "smollm2-135m"]
        base = next(model for model in listing["models"] if model["name"] == "base")
        (instance,) = base["instances"]
        assert (base["loaded"], base["backend"], base["problem"]) == (True, "scripted", None)
        assert (instance["state"], instance["busy"], instance["context_length"]) == ("ready", 0, 4096)
        assert instance["process_id"] in gateway.worker_process_ids()
        assert instance["memory_bytes"] > 2**20

    def test_loaded_models_are_those_that_run(self, gateway: Any) -> None:
        assert names(get(gateway, "/list_loaded_models")) == ["base"]

    def test_available_models_are_told_even_when_one_of_them_is_gone(
        self, start_gateway: Any, tmp_path: Path
    ) -> None:
        gateway = start_gateway(
            {"base": {}, "gone": {"backend": "llama_cpp", "model_id": str(tmp_path / "gone.gguf")}},
            load=["base"],
        )
        listing = {model["name"]: model for model in get(gateway, "/list_available_models")["models"]}
        assert (listing["base"]["loaded"], listing["base"]["problem"]) == (True, None)
        assert not listing["gone"]["loaded"]
        assert "is no file" in listing["gone"]["problem"]
        assert not listing["smollm2-135m"]["loaded"]
        assert listing["smollm2-135m"]["path"].endswith(".gguf")

    def test_what_was_loaded_by_a_path_is_available_with_what_it_takes(
        self, start_gateway: Any, smollm2_path: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "of-mine.gguf"
        file.symlink_to(smollm2_path)
        gateway = start_gateway({"base": {}})
        add(gateway, {"model_id": str(file), "cache_size": 512, "max_seq_len": 512})
        listing = {model["name"]: model for model in get(gateway, "/list_available_models")["models"]}
        assert listing["of-mine"]["loaded"]
        assert listing["of-mine"]["memory_need_bytes"] > file.stat().st_size

    @pytest.mark.parametrize(
        "path", ["/list_models", "/list_loaded_models", "/list_available_models", "/loading_status"]
    )
    def test_each_list_also_stands_behind_v1(self, gateway: Any, path: str) -> None:
        assert get(gateway, path).keys() == get(gateway, f"/v1{path}").keys()


def test_every_path_of_the_router_is_one_that_needs_an_admin_key() -> None:
    app = FastAPI()
    app.include_router(management.router)
    paths = list(app.openapi()["paths"])
    assert {path.removeprefix("/v1").split("/")[1] for path in paths} == set(MANAGEMENT_PATHS)
    assert [path for path in paths if not is_management(path)] == []


def test_the_document_names_every_path_and_every_key_of_an_answer(shared: Any) -> None:
    document = (Path(__file__).parents[2] / "docs/managing_models.md").read_text()
    (base, *_) = get(shared, "/list_models")["models"]
    (available, *_) = get(shared, "/list_available_models")["models"]
    told = [*MANAGEMENT_PATHS, *base, *base["instances"][0], *available]
    assert [name for name in told if f"`{name}" not in document and f"/{name}" not in document] == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"model_id": "smollm2-135m", "gpus": [-1]}, "gpus"),
            ({"model_id": "smollm2-135m", "gpus": "1,x"}, "gpus"),
            ({"model_id": "smollm2-135m", "gpus": [0] * 65}, "gpus"),
            ({"model_id": "smollm2-135m", "cache_size": 0}, "cache_size"),
            ({"model_id": "smollm2-135m", "cach_size": 1}, "cach_size"),
            (
                {"model_id": "smollm2-135m", "default_sampling": {"temperatur": 1}},
                "default_sampling.temperatur",
            ),
            ([{"model_id": "smollm2-135m"}, {"model_id": "smollm2-135m", "replicas": 0}], "[1].replicas"),
            ({"model_name": "nameless"}, "model_id"),
            ({"model_id": None}, "model_id"),
            ({"model_id": ""}, "model_id"),
            ({"model_id": 7}, "model_id"),
            ({"model_id": ["a"]}, "model_id"),
            ({"model_id": "smollm2-135m", "backend": "exLlama"}, "backend"),
            ([{"model_id": "smollm2-135m"}, 7], "[1]"),
            ([], None),
            ([{"model_id": "smollm2-135m"}] * 51, None),
            ("smollm2-135m", None),
            (None, None),
        ],
    )
    def test_a_wrong_spec_is_a_400_that_names_the_key(
        self, gateway: Any, body: object, param: str | None
    ) -> None:
        tasks = get(gateway, "/loading_status")
        assert refusal(post(gateway, "/add_model", body)) == (400, "invalid_value", param)
        assert get(gateway, "/loading_status") == tasks

    @pytest.mark.parametrize(
        "model_id", ["no-such-model", "../no-such-file", "/no/such/file.gguf", "x" * 10_000]
    )
    def test_an_unknown_model_is_a_404(self, gateway: Any, model_id: str) -> None:
        answer = post(gateway, "/add_model", {"model_id": model_id})
        assert refusal(answer) == (404, "model_not_found", "model_id")
        assert len(answer.content) < 8192

    @pytest.mark.parametrize(
        "model_id", ["../../../../../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc"]
    )
    def test_files_that_are_no_models_are_not_read(self, gateway: Any, model_id: str) -> None:
        assert refusal(post(gateway, "/add_model", {"model_id": model_id})) == (
            400,
            "invalid_value",
            "model_id",
        )

    def test_nobody_waits_for_a_pipe(self, gateway: Any, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.gguf")
        (tmp_path / "link.gguf").symlink_to(tmp_path / "pipe.gguf")
        for name in ("pipe.gguf", "link.gguf"):
            answer = post(gateway, "/add_model", {"model_id": str(tmp_path / name)})
            assert refusal(answer) == (400, "invalid_value", "model_id")
            assert "is no regular file" in answer.json()["error"]["message"]

    @pytest.mark.parametrize("key", ["model_id", "model_name", "draft_model_id"])
    def test_no_name_forges_a_line_of_the_log(self, gateway: Any, key: str) -> None:
        spec = {"model_id": "smollm2-135m", key: "x\r\n2026-01-01 ERROR forged \x1b[31m \u202e"}
        assert refusal(post(gateway, "/add_model", spec))[:2] == (400, "invalid_value")
        assert_log_is_sound(gateway)

    def test_names_of_what_is_not_there_forge_nothing_either(self, gateway: Any) -> None:
        for key in ("model_id", "model_name"):
            answer = post(gateway, "/remove_model", {key: "x\r\nforged \x1b[31m"})
            assert refusal(answer) == (404, "model_not_found", key)
        with gateway.client() as client:
            assert refusal(client.get("/task_status/x%0d%0aforged%1b[31m")) == (404, "task_not_found", None)
        assert_log_is_sound(gateway)

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/remove_model", {}),
            ("/remove_model", {"model_id": "base", "model_name": "base"}),
            ("/remove_model", {"model_id": 7}),
            ("/remove_model", {"model_id": "base", "force": True}),
            ("/remove_model", ["base"]),
            ("/stop_model_by_port", {}),
            ("/stop_model_by_port", {"port": "8001"}),
            ("/stop_model_by_port", {"port": True}),
            ("/stop_model_by_port", {"port": 8001, "signal": 9}),
        ],
    )
    def test_a_wrong_body_unloads_nothing(self, gateway: Any, path: str, body: object) -> None:
        assert refusal(post(gateway, path, body))[:2] == (400, "invalid_value")
        assert gateway.state("base")["states"] == ["ready"]

    def test_an_unknown_task_is_a_404(self, gateway: Any) -> None:
        with gateway.client() as client:
            for task_id in ("none", "0", "a/b", "x" * 5000):
                assert client.get(f"/task_status/{task_id}").status_code == 404

    def test_nobody_without_an_admin_key_chooses_a_program(self, gateway: Any) -> None:
        answer = post(gateway, "/add_model", {"model_id": "smollm2-135m", "python": "/bin/sh"})
        assert refusal(answer) == (403, "not_allowed", "python")

    def test_downloading_says_what_to_do_instead(self, gateway: Any) -> None:
        answer = post(gateway, "/download_model", {"model_id": "Qwen/Qwen2.5-7B"})
        assert refusal(answer) == (501, "not_supported", None)
        assert "/add_model" in answer.json()["error"]["message"]

    def test_a_body_too_large_for_a_list_of_models_is_not_read(self, gateway: Any) -> None:
        answer = post(gateway, "/add_model", {"model_id": "x" * 300_000})
        assert refusal(answer)[:2] == (413, "request_too_large")

    def test_thousands_of_mistakes_are_told_of_in_a_few_lines(self, gateway: Any) -> None:
        sampling = {f"key{number}": 1 for number in range(10_000)}
        answer = post(gateway, "/add_model", {"model_id": "smollm2-135m", "default_sampling": sampling})
        assert answer.status_code == 400
        assert len(answer.content) < 8192


def test_with_an_admin_key_a_worker_may_have_an_interpreter_of_its_own(start_gateway: Any) -> None:
    gateway = start_gateway({"base": {}}, wait=False, flags=["--admin-key", "boss"])
    headers = {"authorization": "Bearer boss"}
    spec = scripted("own", spec={"python": "/no/such/python"})
    answer = post(gateway, "/add_model", spec, headers=headers)
    assert refusal(answer) == (400, "invalid_value", "model_id")
    assert "there is no interpreter" in answer.json()["error"]["message"]


def gguf(*, tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


class TestFilesThatOnlyLookLikeModels:
    @pytest.mark.parametrize(
        "content",
        [
            gguf(tensors=2**63, keys=0),
            gguf(tensors=0, keys=2**63),
            gguf(tensors=0, keys=1, rest=struct.pack("<Q", 2**62) + b"general.architecture"),
            gguf(tensors=1, keys=0, rest=b"\x00" * 64),
            gguf(tensors=0, keys=0),
            b"GGUF",
        ],
    )
    def test_what_is_wrong_is_told_and_others_are_answered(
        self, gateway: Any, tmp_path: Path, content: bytes
    ) -> None:
        path = tmp_path / "hostile.gguf"
        path.write_bytes(content)
        task = add(gateway, {"model_id": str(path)})
        assert task["status"] == "failed"
        assert "hostile.gguf" in task["error"]
        assert content_of(ask(gateway, "base", "unharmed")) == "unharmed"

    def test_a_file_of_another_kind_is_refused_at_once(self, gateway: Any, tmp_path: Path) -> None:
        path = tmp_path / "hostile.gguf"
        path.write_bytes(b"FUGG" + b"\x00" * 100)
        answer = post(gateway, "/add_model", {"model_id": str(path)})
        assert refusal(answer) == (400, "invalid_value", "model_id")
        assert "does not begin with the letters GGUF" in answer.json()["error"]["message"]


@pytest.mark.parametrize("gpus", [[1e9], [0] * 63 + [1]])
def test_gpus_that_are_not_there_are_the_reason_of_a_failed_load(gateway: Any, gpus: list[float]) -> None:
    task = add(gateway, {"model_id": "smollm2-135m", "gpus": gpus})
    assert task["status"] == "failed"
    assert "GPU" in task["error"]
