"""`ps`, `load`, `unload` and `stop`, on a stand-in that answers as the script of a test says."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from gallama.cli import main
from gallama.cli.remote import default_url
from gallama.errors import InvalidConfig


class StandIn(HTTPServer):
    """Answers each request with the next of its answers, and notes what it was asked."""

    def __init__(self, answers: Sequence[tuple[int, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.requests: list[tuple[str, str, str | None, Any]] = []
        """Method, path, the header Authorization, and the body."""
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.requests.append((self.command, self.path, self.headers.get("authorization"), body))
        status, content = self.server.answers.pop(0)
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.send_header("location", "/elsewhere")
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def answering(*answers: Any, status: int = 200) -> Iterator[StandIn]:
    contents = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in answers]
    with StandIn([(status, content) for content in contents]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GALLAMA_API_KEY", raising=False)
    # A proxy that does not exist: whoever honours it reaches nothing.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


def instance(**values: Any) -> dict[str, Any]:
    return {
        "instance": 1,
        "port": 8001,
        "state": "ready",
        "progress": 1.0,
        "busy": 2,
        "served": 7,
        "capacity": 16,
        "context_length": 4096,
        "memory_bytes": 300 * 10**6,
        "gpus": [],
        "problem": None,
        **values,
    }


def task(status: str, progress: float, error: str | None = None) -> dict[str, Any]:
    model = {"name": "demo", "instance": 3, "status": status, "progress": progress, "error": error}
    return {"task_id": "t-1", "status": status, "progress": progress, "models": [model], "error": error}


class TestPs:
    def test_models_stand_in_aligned_columns(self, capsys: pytest.CaptureFixture[str]) -> None:
        models = [
            {"name": "a-long-name", "waiting": 3, "instances": [instance(), instance(instance=2, port=8002)]},
            {
                "name": "b",
                "waiting": 0,
                "instances": [instance(instance=12, state="starting", progress=0.5, memory_bytes=3 * 10**9)],
            },
        ]
        with answering({"models": models}) as server:
            assert main(["ps", "--url", server.url]) == 0
        heading, *rows = capsys.readouterr().out.splitlines()
        assert [row.split() for row in rows] == [
            ["a-long-name", "1", "8001", "ready", "2/16", "3", "7", "300", "MB", "4096", "-"],
            ["a-long-name", "2", "8002", "ready", "2/16", "7", "300", "MB", "4096", "-"],
            ["b", "12", "8001", "starting", "50%", "2/16", "0", "7", "3.0", "GB", "4096", "-"],
        ]
        assert {row.index("800") for row in rows} == {heading.index("PORT")}
        assert {row.index("4096") for row in rows} == {heading.index("CONTEXT")}

    def test_why_an_instance_has_failed_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        models = [{"name": "a", "waiting": 0, "instances": [instance(state="failed", problem="no memory")]}]
        with answering({"models": models}) as server:
            main(["ps", "--url", server.url])
        assert "a, instance 1: no memory" in capsys.readouterr().out

    def test_a_name_does_not_change_the_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        models = [{"name": "a\x1b[31m", "waiting": 0, "instances": [instance(problem="\x1b]0;x\x07")]}]
        with answering({"models": models}) as server:
            main(["ps", "--url", server.url])
        output = capsys.readouterr().out
        assert "a?[31m" in output
        assert output.replace("\n", "").isprintable()

    def test_as_json_it_is_what_the_gateway_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        with answering({"models": []}) as server:
            assert main(["ps", "--url", server.url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"models": []}
        assert server.requests == [("GET", "/list_models", None, None)]


class TestLoad:
    def test_it_waits_and_tells_how_far_it_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        answers = [task("queued", 0), task("loading", 0.4), task("loading", 0.4), task("completed", 1)]
        with answering(*answers) as server:
            assert main(["load", "model_id=demo cache_size=512", "--url", server.url]) == 0
        output = capsys.readouterr()
        assert output.err.splitlines() == ["queued, 0%", "loading, 40%"]
        assert output.out == "demo (instance 3) is loaded\n"
        assert server.requests[0] == ("POST", "/add_model", None, {"model_id": "demo", "cache_size": "512"})
        assert {request[:2] for request in server.requests[1:]} == {("GET", "/task_status/t-1")}

    def test_a_failure_ends_with_status_1_and_the_reason(self, capsys: pytest.CaptureFixture[str]) -> None:
        with answering(task("loading", 0), task("failed", 0, "demo: no\x1b[1m memory")) as server:
            assert main(["load", "demo", "--url", server.url]) == 1
        output = capsys.readouterr()
        assert "demo (instance 3) could not be loaded: demo: no?[1m memory" in output.err
        assert output.out == ""

    def test_as_json_the_ended_task_is_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        with answering(task("loading", 0), task("failed", 0, "no")) as server:
            assert main(["load", "demo", "--json", "--url", server.url]) == 1
        assert json.loads(capsys.readouterr().out)["error"] == "no"

    def test_without_waiting_it_tells_what_has_begun(self, capsys: pytest.CaptureFixture[str]) -> None:
        with answering(task("loading", 0)) as server:
            assert main(["load", "demo", "--no-wait", "--url", server.url]) == 0
        assert capsys.readouterr().out == "demo (instance 3) is loading\n"

    def test_a_path_from_here_is_sent_as_a_whole_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "m.gguf").touch()
        (tmp_path / "mistral").mkdir()
        sent = []
        for model_id in ("m.gguf", "./mistral", "mistral", "gone.gguf", "Qwen/Qwen2.5"):
            with answering(task("completed", 1)) as server:
                main(["load", f"model_id={model_id}", "--url", server.url])
            sent.append(server.requests[0][3]["model_id"])
        # What may be a name, or is not here, is the gateway's to find.
        here = str(tmp_path)
        assert sent == [f"{here}/m.gguf", f"{here}/mistral", "mistral", "gone.gguf", "Qwen/Qwen2.5"]

    @pytest.mark.parametrize("spec", ["model_id=demo cach_size=1", "cache_size=1", "model_id='demo"])
    def test_a_spec_that_cannot_be_read_is_not_sent(
        self, spec: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with answering() as server:
            assert main(["load", spec, "--url", server.url]) == 2
        assert server.requests == []
        assert capsys.readouterr().err.startswith("gallama: -id ")


REMOVED = {
    "name": "demo",
    "instance": 3,
    "memory_freed_bytes": 300 * 10**6,
    "gpu_memory_freed_bytes": 0,
    "verified": True,
    "cut_requests": 0,
}


class TestUnload:
    @pytest.mark.parametrize("command", ["unload", "stop"])
    def test_it_tells_what_was_given_back(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with answering({"removed": [REMOVED]}) as server:
            assert main([command, "demo", "--url", server.url]) == 0
        assert capsys.readouterr().out == "demo (instance 3) has ended and gave back 300 MB of memory\n"
        assert server.requests == [("POST", "/remove_model", None, {"model_id": "demo"})]

    def test_what_went_less_well_is_told_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        less = {"gpu_memory_freed_bytes": 2 * 10**9, "verified": False, "cut_requests": 2}
        with answering({"removed": [REMOVED | less]}) as server:
            main(["unload", "demo", "--url", server.url])
        assert capsys.readouterr().out == (
            "demo (instance 3) has ended and gave back 300 MB of memory and 2.0 GB of GPU memory, which could"
            " not be verified; running answers that were cut: 2\n"
        )

    def test_what_was_not_loaded_is_said_not_to_be(self, capsys: pytest.CaptureFixture[str]) -> None:
        with answering({"removed": []}) as server:
            assert main(["unload", "demo", "--url", server.url]) == 0
        assert capsys.readouterr().out == "It was not loaded.\n"

    def test_a_number_stops_the_instance_of_that_port(self) -> None:
        with answering({"removed": [REMOVED]}) as server:
            main(["stop", "8003", "--url", server.url])
        assert server.requests == [("POST", "/stop_model_by_port", None, {"port": 8003})]


class TestTheGateway:
    def test_a_gateway_that_does_not_run_is_one_line_and_status_2(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main(["ps", "--url", url]) == 2
        assert capsys.readouterr().err == (
            f"gallama: No gateway answers at {url}: Connection refused. Start it with `gallama serve`, or"
            " name its address with --url.\n"
        )

    def test_its_errors_are_told_in_its_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        error = {"message": "No model is called 'x\x1b'.", "type": "t", "param": None, "code": "c"}
        with answering({"error": error}, status=404) as server:
            assert main(["unload", "x", "--url", server.url]) == 2
        assert capsys.readouterr().err == "gallama: No model is called 'x?'.\n"

    @pytest.mark.parametrize("answer", [b"<html>hello</html>", b"[]", b'{"other": 1}', b"", b"\xff"])
    def test_another_server_is_not_taken_for_it(
        self, answer: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with answering(answer) as server:
            assert main(["ps", "--url", server.url]) == 2
        assert "is no gateway" in capsys.readouterr().err

    def test_no_redirect_is_followed(self, capsys: pytest.CaptureFixture[str]) -> None:
        with answering(b"", status=307) as server:
            assert main(["ps", "--url", server.url]) == 2
        assert [request[1] for request in server.requests] == ["/list_models"]
        assert "status 307" in capsys.readouterr().err

    def test_the_key_is_that_of_the_flag_or_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GALLAMA_API_KEY", "from-environment")
        with answering({"models": []}, {"models": []}) as server:
            main(["ps", "--url", server.url])
            main(["ps", "--url", server.url, "--api-key", "schlüssel"])
        keys = [request[2] for request in server.requests]
        assert keys == ["Bearer from-environment", "Bearer " + "schlüssel".encode().decode("latin-1")]

    @pytest.mark.parametrize("key", ["a\r\nX-Evil: 1", "a b"])
    def test_a_key_is_no_second_header(self, key: str, capsys: pytest.CaptureFixture[str]) -> None:
        with answering() as server:
            assert main(["ps", "--url", server.url, "--api-key", key]) == 2
        assert server.requests == []
        assert key not in capsys.readouterr().err

    @pytest.mark.parametrize(
        "url",
        ["localhost:8000", "ftp://x", "http://", "http://u:p@h", "http://h:x", "http://[::1", "http://h\n"],
    )
    def test_what_is_no_address_is_refused(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["ps", "--url", url]) == 2
        assert "is no address of a gateway" in capsys.readouterr().err

    @pytest.mark.parametrize("behind", ["/", "/v1", "/v1/"])
    def test_the_address_that_clients_of_openai_use_is_understood(self, behind: str) -> None:
        with answering({"models": []}) as server:
            main(["ps", "--url", server.url + behind])
        assert server.requests[0][1] == "/list_models"

    @pytest.mark.parametrize(
        ("variables", "url"),
        [
            ({}, "http://127.0.0.1:8000"),
            ({"GALLAMA_PORT": "81"}, "http://127.0.0.1:81"),
            ({"GALLAMA_HOST": "0.0.0.0"}, "http://127.0.0.1:8000"),
            ({"GALLAMA_HOST": "::"}, "http://[::1]:8000"),
            ({"GALLAMA_HOST": "my.host", "GALLAMA_API_KEY": "k"}, "http://my.host:8000"),
        ],
    )
    def test_without_an_address_it_is_where_this_configuration_puts_it(
        self, variables: dict[str, str], url: str, tmp_path: Path
    ) -> None:
        assert default_url({"GALLAMA_HOME": str(tmp_path), **variables}) == url

    def test_the_config_file_says_where_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "model_config.yaml").write_text("_server: {port: 82}\n")
        assert default_url({"GALLAMA_HOME": str(tmp_path)}) == "http://127.0.0.1:82"

    def test_any_free_port_is_no_address(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidConfig, match="--url"):
            default_url({"GALLAMA_HOME": str(tmp_path), "GALLAMA_PORT": "0"})
