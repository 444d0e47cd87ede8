"""Keys, hosts, origins: who is answered."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from gallama.api.app import create_app
from gallama.config import ServerConfig
from gallama.pool.pool import WorkerPool

KEYS = ("first-key", "zweiter-schlüssel")


def client_of(**settings: Any) -> httpx.AsyncClient:
    """A client of an application without models."""
    app = create_app(WorkerPool([]), ServerConfig.model_validate(settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


class TestKeys:
    @pytest.mark.parametrize("key", KEYS)
    async def test_each_key_opens(self, key: str) -> None:
        async with client_of(api_keys=KEYS) as client:
            headers = {b"authorization": f"Bearer {key}".encode()}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b"Bearer",
            b"Bearer ",
            b"first-key",
            b"Basic first-key",
            b"Bearer First-Key",
            b"Bearer first-key first-key",
            b"Bearer wrong",
            b"Bearer \xff\xfe",
            b"Bearer " + b"x" * 60_000,
        ],
    )
    async def test_anything_else_is_a_401_in_openais_form(self, header: bytes) -> None:
        async with client_of(api_keys=KEYS) as client:
            answer = await client.get("/v1/models", headers={b"authorization": header})
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]
        assert not any(key in answer.text for key in KEYS)

    async def test_two_headers_are_refused_even_if_one_is_right(self) -> None:
        async with client_of(api_keys=KEYS) as client:
            headers = [("authorization", "Bearer first-key"), ("authorization", "Bearer wrong")]
            assert (await client.get("/v1/models", headers=headers)).status_code == 401

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/models",
            "/v1/chat/completions",
            "/ready",
            "/nowhere",
            "/health/",
            "//health",
            "/health/../ready",
        ],
    )
    async def test_every_path_but_one_is_closed(self, path: str) -> None:
        async with client_of(api_keys=KEYS) as client:
            assert (await client.get(path)).status_code == 401

    async def test_health_is_open(self) -> None:
        async with client_of(api_keys=KEYS) as client:
            assert (await client.get("/health")).status_code == 200

    async def test_a_key_in_the_query_opens_nothing(self) -> None:
        async with client_of(api_keys=KEYS) as client:
            assert (await client.get("/v1/models?api_key=first-key")).status_code == 401

    async def test_keys_do_not_reach_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("DEBUG"):
            async with client_of(api_keys=KEYS) as client:
                await client.get("/v1/models", headers={"authorization": "Bearer first-key"})
                await client.get("/v1/models", headers={"authorization": "Bearer secret-guess"})
        assert "/v1/models" in caplog.text
        assert "first-key" not in caplog.text
        assert "secret-guess" not in caplog.text


class TestHosts:
    @pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:80", "[::1]:9", "LOCALHOST"])
    async def test_this_machines_names_are_answered(self, host: str) -> None:
        async with client_of() as client:
            assert (await client.get("/health", headers={"host": host})).status_code == 200

    @pytest.mark.parametrize(
        "host",
        [
            "evil.com",
            "localhost.evil.com",
            "evil@localhost",
            "localhost/../x",
            "",
            "[::1",
            "127.0.0.1.nip.io",
        ],
    )
    async def test_other_names_are_refused(self, host: str) -> None:
        async with client_of() as client:
            answer = await client.get("/health", headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")

    @pytest.mark.parametrize("origin", ["http://evil.com", "https://localhost.evil.com", "null", "file://"])
    async def test_foreign_pages_are_refused(self, origin: str) -> None:
        async with client_of() as client:
            assert (await client.get("/health", headers={"origin": origin})).status_code == 403

    async def test_pages_of_this_machine_are_answered(self) -> None:
        async with client_of() as client:
            headers = {"origin": "http://localhost:3000"}
            assert (await client.get("/health", headers=headers)).status_code == 200

    async def test_a_server_for_all_answers_to_every_name(self) -> None:
        async with client_of(host="0.0.0.0") as client:
            headers = {"host": "my.server", "origin": "http://evil.com"}
            assert (await client.get("/health", headers=headers)).status_code == 200


class TestPaths:
    @pytest.fixture
    def client(self) -> httpx.AsyncClient:
        return client_of()

    async def test_an_unknown_path_is_a_404_in_openais_form(self, client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/nowhere")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")

    async def test_a_wrong_method_is_a_405_in_openais_form(self, client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/chat/completions")
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"

    async def test_methods_cannot_be_overridden(self, client: httpx.AsyncClient) -> None:
        headers = {"x-http-method-override": "POST"}
        assert (await client.get("/v1/chat/completions", headers=headers)).status_code == 405

    @pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
    async def test_there_are_no_other_pages(self, client: httpx.AsyncClient, path: str) -> None:
        assert (await client.get(path)).status_code == 404

    async def test_an_unknown_model_is_a_404(self, client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/models/some/model")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
