"""Keys and what they open: settings, the file that may change, admins, and the limits of each key."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.types import Message

from gallama.api import management
from gallama.api.app import create_app
from gallama.api.auth import is_management
from gallama.api.keys import ANYBODY, LOOK_SECONDS, Caller, KeyRing
from gallama.api.rate_limits import Account, KeyLimits
from gallama.api.tickets import MAX_TIMEOUT_SECONDS, ticket_of
from gallama.config import ServerConfig, load_config
from gallama.errors import InvalidConfig, InvalidRequest
from gallama.pool.pool import WorkerPool
from gallama.pool.ticket import RequestRecord

USER, ADMIN, OTHER = "user-key-1", "admin-key-1", "other-key-1"
CHAT = "/v1/chat/completions"
PATHS_OF_USERS = ("/v1/models", "/ready")


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def keys_file(folder: Path, text: str) -> Path:
    path = folder / "keys.yaml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def app_of(**settings: Any) -> FastAPI:
    """An application without models."""
    return create_app(WorkerPool([]), ServerConfig.model_validate(settings))


def client_of(**settings: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_of(**settings), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def basic(password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


async def status_of_raw_path(app: FastAPI, method: str, raw_path: str, key: str) -> int:
    """As if the path had come over a socket: httpx would clean it up first."""
    path, _, query = raw_path.partition("?")
    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": headers,
    }
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    return statuses[0]


def paths_of(router: FastAPI | APIRouter) -> set[str]:
    return set(get_openapi(title="t", version="1", routes=router.routes)["paths"])


async def status(client: httpx.AsyncClient, path: str, key: str, method: str = "GET") -> int:
    return (await client.request(method, path, headers=bearer(key))).status_code


class TestAdmins:
    @pytest.mark.parametrize("prefix", ["", "/v1"])
    async def test_a_users_key_does_not_manage_where_there_is_an_admins(self, prefix: str) -> None:
        async with client_of(api_keys=[USER], admin_keys=[ADMIN]) as client:
            answer = await client.get(f"{prefix}/list_models", headers=bearer(USER))
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_allowed")
            assert answer.json()["error"]["type"] == "permission_error"
            assert await status(client, f"{prefix}/list_models", ADMIN) != 403

    async def test_an_admins_key_opens_what_a_users_does(self) -> None:
        async with client_of(api_keys=[USER], admin_keys=[ADMIN]) as client:
            for path in PATHS_OF_USERS:
                assert await status(client, path, USER) == await status(client, path, ADMIN) == 200

    async def test_with_admin_keys_alone_everything_needs_one(self) -> None:
        async with client_of(admin_keys=[ADMIN]) as client:
            for path in (*PATHS_OF_USERS, "/list_models", "/metrics", "/", "/status"):
                assert (await client.get(path)).status_code == 401, path
            assert await status(client, "/v1/models", ADMIN) == 200

    async def test_without_admin_keys_every_key_manages(self) -> None:
        async with client_of(api_keys=[USER]) as client:
            assert await status(client, "/list_models", USER) not in (401, 403)
            assert (await client.get("/list_models")).status_code == 401

    async def test_a_key_for_certain_models_manages_none(self, tmp_path: Path) -> None:
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}, models: [m]}}\n- {{name: b, key: {OTHER}}}\n")
        async with client_of(keys_file=path) as client:
            assert await status(client, "/list_models", USER) == 403
            assert await status(client, "/list_models", OTHER) != 403

    async def test_a_key_for_certain_models_sees_nothing_that_tells_of_all(self, tmp_path: Path) -> None:
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}, models: [m]}}\n- {{name: b, key: {OTHER}}}\n")
        async with client_of(keys_file=path) as client:
            for page in ("/", "/status", "/metrics"):
                assert await status(client, page, USER) == 403
                assert await status(client, page, OTHER) == 200

    async def test_a_key_in_both_settings_is_an_admins(self) -> None:
        async with client_of(api_keys=[USER], admin_keys=[USER]) as client:
            assert await status(client, "/list_models", USER) != 403

    @pytest.mark.parametrize(
        "path",
        [
            "/list_models/",
            "//list_models",
            "/v1//list_models",
            "//v1/list_models",
            "/v1/v1/list_models",
            "/./list_models",
            "/v1/../list_models",
            "/LIST_MODELS",
            "/V1/List_Models",
            "/%6cist_models",
            "/%2Flist_models",
            "/v1%2Flist_models",
            "/task_status/7",
            "/task_status/../7",
            "/add_model?x=/health",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
    async def test_no_way_to_write_a_path_leads_around_the_check(self, path: str, method: str) -> None:
        app = app_of(api_keys=[USER], admin_keys=[ADMIN])
        assert await status_of_raw_path(app, method, path, USER) == 403

    @pytest.mark.parametrize(
        "path",
        [
            "/%256cist_models",
            "/x/../list_models",
            "/list_models;x",
            "/list_models%00",
            "/v1/models/../../list_models",
        ],
    )
    async def test_what_is_no_such_path_leads_to_no_such_place(self, path: str) -> None:
        app = app_of(api_keys=[USER], admin_keys=[ADMIN])
        assert await status_of_raw_path(app, "GET", path, USER) == 404

    def test_every_route_of_management_is_one_that_the_check_knows(self) -> None:
        paths = paths_of(management.router)
        assert "/v1/add_model" in paths
        assert all(is_management(path) for path in paths), paths

    @pytest.mark.filterwarnings("ignore:Duplicate Operation ID")
    def test_no_other_route_is_taken_for_management(self) -> None:
        others = paths_of(app_of()) - paths_of(management.router)
        assert CHAT in others
        assert not any(is_management(path) for path in others), others

    async def test_the_host_header_does_not_change_the_path(self) -> None:
        async with client_of(api_keys=[USER], admin_keys=[ADMIN], host="0.0.0.0") as client:
            for host in ("localhost/health?", "x/health", "a@b/health#"):
                answer = await client.get("/list_models", headers={"host": host, **bearer(USER)})
                assert answer.status_code == 403
                assert (await client.get("/list_models", headers={"host": host})).status_code == 401


class TestWhatIsOpen:
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    async def test_health_alone_is_open(self, method: str) -> None:
        async with client_of(api_keys=[USER]) as client:
            assert (await client.request(method, "/health")).status_code == 200
            for path in (
                "/",
                "/status",
                "/metrics",
                "/ready",
                "/v1/models",
                "/add_model",
                "/health/",
                "/v1/health",
            ):
                assert (await client.request(method, path)).status_code == 401, path

    @pytest.mark.parametrize("method", ["POST", "PUT", "OPTIONS", "DELETE", "TRACE", "CONNECT"])
    async def test_health_is_open_to_readers_only(self, method: str) -> None:
        async with client_of(api_keys=[USER]) as client:
            assert (await client.request(method, "/health")).status_code == 401

    async def test_a_foreign_page_is_refused_with_a_key_as_well(self) -> None:
        async with client_of(api_keys=[USER]) as client:
            headers = {"origin": "http://evil.com", **bearer(USER)}
            for path in ("/v1/models", "/list_models", "/", "/status", "/metrics"):
                assert (await client.get(path, headers=headers)).status_code == 403, path
                assert (await client.get(path, headers={"host": "evil.com"})).status_code == 403, path


class TestPagesInABrowser:
    @pytest.mark.parametrize("path", ["/", "/status"])
    async def test_the_key_may_be_the_password(self, path: str) -> None:
        async with client_of(api_keys=[USER]) as client:
            assert (await client.get(path, headers=basic(USER))).status_code not in (401, 403)
            assert (await client.get(path, headers=bearer(USER))).status_code not in (401, 403)

    async def test_the_browser_is_told_to_ask_for_it(self) -> None:
        async with client_of(api_keys=[USER]) as client:
            answer = await client.get("/")
        assert answer.headers.get_list("www-authenticate") == [
            "Bearer",
            'Basic realm="gallama", charset="UTF-8"',
        ]

    @pytest.mark.parametrize(
        "header",
        [
            basic("wrong")["authorization"],
            basic("")["authorization"],
            "Basic",
            "Basic ",
            "Basic !!!",
            "Basic " + base64.b64encode(USER.encode()).decode(),
            "Basic " + base64.b64encode(f"{USER}:".encode()).decode(),
            f"Basic {USER}",
        ],
    )
    async def test_any_other_password_opens_nothing(self, header: str) -> None:
        async with client_of(api_keys=[USER]) as client:
            assert (await client.get("/", headers={"authorization": header})).status_code == 401

    @pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", CHAT), ("POST", "/")])
    async def test_a_password_opens_nothing_else(self, method: str, path: str) -> None:
        async with client_of(api_keys=[USER]) as client:
            answer = await client.request(method, path, headers=basic(USER))
        assert answer.status_code == 401
        assert answer.headers.get_list("www-authenticate") == ["Bearer"]

    async def test_a_password_of_a_non_ascii_key_opens(self) -> None:
        async with client_of(api_keys=["schlüssel"]) as client:
            assert (await client.get("/", headers=basic("schlüssel"))).status_code != 401


class TestTheFile:
    async def test_its_keys_open_beside_those_of_the_settings(self, tmp_path: Path) -> None:
        digest = hashlib.sha256(OTHER.encode()).hexdigest()
        path = keys_file(
            tmp_path, f"- {{name: a, key: {ADMIN}, admin: true}}\n- {{name: b, key_sha256: {digest}}}\n"
        )
        async with client_of(api_keys=[USER], keys_file=path) as client:
            for key in (USER, ADMIN, OTHER):
                assert await status(client, "/v1/models", key) == 200
            assert await status(client, "/list_models", ADMIN) != 403
            assert await status(client, "/list_models", OTHER) == 403
            # The digest is no key.
            assert await status(client, "/v1/models", digest) == 401

    @pytest.mark.parametrize("text", [None, "", "[]", "- {name: a}"])
    def test_a_wrong_one_keeps_the_server_from_starting(self, tmp_path: Path, text: str | None) -> None:
        path = keys_file(tmp_path, text) if text is not None else tmp_path / "gone.yaml"
        with pytest.raises(InvalidConfig):
            create_app(WorkerPool([]), ServerConfig(keys_file=path))

    def test_a_key_of_the_settings_must_not_stand_in_it(self, tmp_path: Path) -> None:
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}, requests_per_minute: 1}}\n")
        with pytest.raises(InvalidConfig, match=r"the key of 'a' is also `api_keys\[1\]`") as caught:
            KeyRing(ServerConfig(api_keys=("x", USER), keys_file=path))
        assert USER not in str(caught.value)

    async def test_a_change_is_seen_within_a_second(self, tmp_path: Path) -> None:
        clock = Clock()
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}}}\n")
        keys = KeyRing(ServerConfig(keys_file=path), clock)
        keys_file(tmp_path, f"- {{name: longer, key: {OTHER}}}\n")
        await keys.follow_file()
        assert keys.find(USER.encode()) is not None
        clock.now += LOOK_SECONDS
        await keys.follow_file()
        assert keys.find(USER.encode()) is None
        assert keys.find(OTHER.encode()) is not None

    async def test_a_file_put_in_its_place_is_seen(self, tmp_path: Path) -> None:
        """As editors and secret stores do: of the same size and time."""
        clock = Clock()
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}}}\n")
        keys = KeyRing(ServerConfig(keys_file=path), clock)
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        new = tmp_path / "new.yaml"
        new.write_text(f"- {{name: a, key: {USER[:-1]}2}}\n")
        os.utime(new, ns=times)
        new.replace(path)
        clock.now += LOOK_SECONDS
        await keys.follow_file()
        assert keys.find(USER.encode()) is None

    @pytest.mark.parametrize("text", [None, "", "- {name: a", f"- {{name: a, key: {OTHER}, x: 1}}"])
    async def test_a_broken_version_changes_nothing_and_is_told_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None
    ) -> None:
        clock = Clock()
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}}}\n")
        keys = KeyRing(ServerConfig(keys_file=path), clock)
        if text is None:
            path.unlink()
        else:
            keys_file(tmp_path, text)
        for _ in range(3):
            clock.now += LOOK_SECONDS
            await keys.follow_file()
        assert keys.find(USER.encode()) is not None
        assert keys.find(OTHER.encode()) is None
        (record,) = caplog.records
        assert (record.levelname, str(path) in record.getMessage()) == ("ERROR", True)
        assert USER not in caplog.text
        assert OTHER not in caplog.text
        keys_file(tmp_path, f"- {{name: again, key: {OTHER}}}\n")
        clock.now += LOOK_SECONDS
        await keys.follow_file()
        assert keys.find(OTHER.encode()) is not None

    async def test_a_new_version_keeps_what_a_key_has_used(self, tmp_path: Path) -> None:
        clock = Clock()
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}, max_concurrent_requests: 1}}\n")
        keys = KeyRing(ServerConfig(keys_file=path), clock)
        before = keys.find(USER.encode())
        assert before is not None
        before.account.enter()
        keys_file(tmp_path, f"- {{name: renamed, key: {USER}, max_concurrent_requests: 2}}\n")
        clock.now += LOOK_SECONDS
        await keys.follow_file()
        after = keys.find(USER.encode())
        assert after is not None
        assert (after.name, after.account.running) == ("renamed", 1)

    async def test_what_others_may_read_is_warned_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock = Clock()
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}}}\n")
        keys = KeyRing(ServerConfig(keys_file=path), clock)
        assert not caplog.records
        path.chmod(0o640)
        clock.now += LOOK_SECONDS
        with caplog.at_level("WARNING"):
            await keys.follow_file()
        assert "chmod 600" in caplog.text
        assert USER not in caplog.text


class TestSources:
    def test_the_environment_gives_both_kinds(self) -> None:
        variables = {
            "GALLAMA_API_KEYS": f"{USER},{OTHER}",
            "GALLAMA_ADMIN_KEYS": ADMIN,
            "GALLAMA_KEYS_FILE": "k.yaml",
        }
        config = load_config(None, variables, {})
        assert (config.api_keys, config.admin_keys) == ((USER, OTHER), (ADMIN,))
        assert config.keys_file == Path("k.yaml")

    def test_no_setting_shows_a_key(self) -> None:
        config = ServerConfig(api_keys=(USER,), admin_keys=(ADMIN,))
        for text in (repr(config), str(config), f"{config}"):
            assert USER not in text
            assert ADMIN not in text

    @pytest.mark.parametrize("name", ["GALLAMA_API_KEYS", "GALLAMA_ADMIN_KEYS"])
    @pytest.mark.parametrize("value", ["", f"{USER},", f" ,{USER}", f"{USER}\x07"])
    def test_a_wrong_list_of_keys_is_told_without_them(self, name: str, value: str) -> None:
        with pytest.raises(InvalidConfig, match=name) as caught:
            load_config(None, {name: value}, {})
        assert USER not in caught.value.message

    def test_a_key_ring_shows_no_key(self) -> None:
        keys = KeyRing(ServerConfig(api_keys=(USER,)))
        caller = keys.find(USER.encode())
        assert caller is not None
        assert caller.name == "api_keys[0]"
        assert USER not in repr(caller) + repr(keys)


class TestLimitsOverHttp:
    """An application without models answers 404 to a question: it has counted then."""

    BODY: ClassVar = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

    async def test_what_is_over_the_limit_is_a_429_with_the_time_to_wait(self, tmp_path: Path) -> None:
        path = keys_file(
            tmp_path, f"- {{name: a, key: {USER}, requests_per_minute: 2}}\n- {{name: b, key: {OTHER}}}\n"
        )
        async with client_of(keys_file=path) as client:
            for remaining in ("1", "0"):
                answer = await client.post(CHAT, json=self.BODY, headers=bearer(USER))
                assert answer.status_code == 404
                assert answer.headers["x-ratelimit-limit-requests"] == "2"
                assert answer.headers["x-ratelimit-remaining-requests"] == remaining
                assert answer.headers["x-ratelimit-reset-requests"]
            answer = await client.post(CHAT, json=self.BODY, headers=bearer(USER))
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            assert 28 <= int(answer.headers["retry-after"]) <= 30
            # Nobody else is held up, and lists are free.
            assert (await client.post(CHAT, json=self.BODY, headers=bearer(OTHER))).status_code == 404
            for _ in range(5):
                answer = await client.get("/v1/models", headers=bearer(USER))
                assert answer.status_code == 200
                assert "x-ratelimit-limit-requests" not in answer.headers

    async def test_whoever_has_no_key_uses_up_nobodys_limit(self, tmp_path: Path) -> None:
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}, requests_per_minute: 1}}\n")
        async with client_of(keys_file=path) as client:
            for _ in range(3):
                assert (await client.post(CHAT, json=self.BODY)).status_code == 401
            assert (await client.post(CHAT, json=self.BODY, headers=bearer(USER))).status_code == 404

    async def test_a_place_is_given_back_whatever_becomes_of_a_request(self, tmp_path: Path) -> None:
        path = keys_file(tmp_path, f"- {{name: a, key: {USER}, max_concurrent_requests: 1}}\n")
        async with client_of(keys_file=path) as client:
            for content in (b"", b"{", b"[]", b'{"model": 1}'):
                answer = await client.post(CHAT, content=content, headers=bearer(USER))
                assert answer.status_code == 400


def request_with(*values: str, caller: Caller = ANYBODY) -> Request:
    headers = [(b"x-request-timeout-seconds", value.encode("latin-1")) for value in values]
    return Request({"type": "http", "headers": headers, "state": {"caller": caller}})


def record(**values: Any) -> RequestRecord:
    return RequestRecord(
        request_id="r",
        operation="chat",
        model="m",
        instance=1,
        key_name="a",
        outcome="completed",
        error_code="",
        entered_at=0,
        queue_seconds=0,
        first_token_seconds=None,
        seconds=1,
        tries=1,
        **values,
    )


class TestTickets:
    def test_without_the_header_there_is_no_deadline(self) -> None:
        assert ticket_of(request_with()).deadline is None

    @pytest.mark.parametrize("value", ["1", "0.5", "1e2", str(MAX_TIMEOUT_SECONDS)])
    def test_the_header_sets_one(self, value: str) -> None:
        earlier, later = ticket_of(request_with(value)).deadline, ticket_of(request_with(value)).deadline
        assert earlier is not None
        assert later is not None
        assert 0 <= later - earlier < 1

    @pytest.mark.parametrize(
        "values",
        [
            ("0",),
            ("-1",),
            ("nan",),
            ("inf",),
            ("-inf",),
            ("1e400",),
            ("",),
            ("soon",),
            ("86401",),
            ("1_0",),
            ("1", "2"),
            ("1, 2",),
            ("\xb2",),
        ],
    )
    def test_any_other_value_is_named_and_refused(self, values: tuple[str, ...]) -> None:
        with pytest.raises(InvalidRequest) as caught:
            ticket_of(request_with(*values))
        assert caught.value.report().param == "x-request-timeout-seconds"

    def test_the_key_pays_for_prompt_and_answer(self) -> None:
        account = Account(KeyLimits(tokens_per_minute=100))
        caller = Caller(name="office", is_admin=False, models=None, account=account)
        ticket = ticket_of(request_with(caller=caller))
        assert ticket.key_name == "office"
        assert ticket.on_end is not None
        ticket.on_end(record(prompt_tokens=60, completion_tokens=30, cached_tokens=50))
        assert account.headers()["x-ratelimit-remaining-tokens"] == "10"
