"""GET / and GET /status: what the gateway does now, in figures and in a real browser."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, HttpCredentials, Page, Route, expect, sync_playwright

from gallama import __version__
from gallama.api.app import create_app
from gallama.api.status_page import WINDOW_SECONDS, Speedometer
from gallama.config import ServerConfig
from gallama.pool.gpus import Gpu
from gallama.pool.pool import WorkerPool

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LOOK_MS = 15_000
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium; as root, scripts/setup dev installs Debian's"
)


class TestSpeed:
    def test_a_steady_pace_is_found_however_often_one_looks(self) -> None:
        rng = random.Random(0)
        for _ in range(100):
            speed, speedometer, now = rng.uniform(1, 500), Speedometer(), 0.0
            for _ in range(rng.randint(2, 60)):
                now += rng.uniform(0.5, 5)
                speedometer.read(now, {1: round(now * speed)})
            assert speedometer.tokens_per_second(1) == pytest.approx(speed, abs=3)

    def test_it_forgets_what_was_long_ago(self) -> None:
        speedometer = Speedometer()
        for second in range(100):
            speedometer.read(second, {1: 1000 * min(second, 50)})
        assert speedometer.tokens_per_second(1) == 0

    def test_nothing_is_said_of_a_time_in_which_nobody_looked(self) -> None:
        speedometer = Speedometer()
        speedometer.read(0, {1: 0})
        speedometer.read(WINDOW_SECONDS + 1, {1: 1000})
        assert speedometer.tokens_per_second(1) == 0

    def test_it_is_never_negative_when_a_worker_begins_anew(self) -> None:
        speedometer = Speedometer()
        for second, tokens in enumerate((500, 600, 20, 50)):
            speedometer.read(second, {1: tokens})
            assert speedometer.tokens_per_second(1) >= 0
        assert speedometer.tokens_per_second(1) == 30

    def test_it_keeps_little_and_nothing_of_instances_that_are_gone(self) -> None:
        speedometer = Speedometer()
        for step in range(5000):
            speedometer.read(step / 2, {step // 100: step, -1: step})
        kept = speedometer._readings
        assert set(kept) == {49, -1}
        assert all(len(readings) <= 2 * WINDOW_SECONDS + 2 for readings in kept.values())


def client_of_nothing(gpus: Sequence[Gpu] = ()) -> httpx.AsyncClient:
    app = create_app(WorkerPool([], inventory=lambda: gpus), ServerConfig())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


class TestPage:
    async def test_it_may_load_and_run_nothing_but_itself(self) -> None:
        async with client_of_nothing() as client:
            answer = await client.get("/")
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        for directive in ("script-src", "style-src"):
            assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[directive])

    async def test_it_is_one_file_that_makes_html_of_no_text(self) -> None:
        async with client_of_nothing() as client:
            page = (await client.get("/")).text
        assert set(re.findall(r"https?://[^\s'\"]+", page)) == {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", page)

    async def test_a_gateway_without_models_has_a_status(self) -> None:
        async with client_of_nothing() as client:
            status = (await client.get("/status")).json()
        assert status.pop("uptime_seconds") >= 0
        assert status == {
            "version": __version__,
            "busy": 0,
            "waiting": 0,
            "tokens_per_second": 0,
            "memory_bytes": 0,
            "gpus": [],
            "models": [],
            "problems": [],
        }

    async def test_the_gpus_are_told_with_what_is_used_of_them(self) -> None:
        gpu = Gpu(index=0, name="RTX 4090", total_bytes=24 * 2**30, free_bytes=20 * 2**30)
        async with client_of_nothing([gpu]) as client:
            status = (await client.get("/status")).json()
        assert status["gpus"] == [
            {"index": 0, "name": "RTX 4090", "memory_bytes": 24 * 2**30, "memory_used_bytes": 4 * 2**30}
        ]


MODELS = {
    "echo": {"aliases": ["parrot"]},
    "slow": {"script": {"reply": "x" * 4000, "seconds_per_token": 0.02}, "max_concurrent_requests": 1},
    "broken": {"script": {"fail_at_load": "The file is broken."}},
    HOSTILE: {"aliases": ["<script>document.title='taken'</script>"]},
}


def stream_of(model: str) -> dict[str, Any]:
    return {"model": model, "stream": True, "messages": [{"role": "user", "content": "hi"}]}


@contextlib.contextmanager
def streaming(gateway: Any, model: str) -> Iterator[None]:
    """A stream that runs inside the context."""
    body = stream_of(model)
    with gateway.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        # Held on to: once it is gone, so is the connection.
        lines = answer.iter_lines()
        # Before it there may be comments on its place in the line.
        next(line for line in lines if line.startswith("data:"))
        yield


@pytest.fixture
def gateway(start_gateway: Callable[..., Any]) -> Any:
    """Two models are loaded, one could not be, and the one with a hostile name was never asked."""
    gateway = start_gateway(MODELS, load=[])
    for model in ("echo", "slow", "broken"):
        gateway.post(stream_of(model) | {"stream": False, "max_tokens": 1})
    return gateway


def test_the_status_tells_of_instances_streams_and_problems(gateway: Any) -> None:
    with streaming(gateway, "slow"), gateway.client() as client:
        status = client.get("/status").json()
    models = {model["name"]: model for model in status["models"]}
    assert models["slow"]["busy"] == status["busy"] == 1
    (echo,) = models["echo"]["instances"]
    assert (echo["state"], echo["busy"], echo["problem"]) == ("ready", 0, "")
    assert echo["memory_bytes"] > 2**20
    assert status["memory_bytes"] >= echo["memory_bytes"]
    assert models["echo"]["aliases"] == ["parrot"]
    (problem,) = status["problems"]
    assert problem["model"] == "broken"
    assert "The file is broken." in problem["message"]


def test_a_worker_that_has_stopped_does_not_stop_the_status(start_gateway: Callable[..., Any]) -> None:
    gateway = start_gateway({"echo": {}})
    (process_id,) = gateway.worker_process_ids()
    os.kill(process_id, signal.SIGSTOP)
    try:
        with gateway.client() as client:
            status = client.get("/status").json()
    finally:
        os.kill(process_id, signal.SIGCONT)
    assert status["models"][0]["instances"][0]["state"] == "ready"


@pytest.fixture(scope="class")
def browser() -> Iterator[Browser]:
    # Not for longer: as long as it runs, no test can have an event loop of its own.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@needs_chromium
class TestBrowser:
    @pytest.fixture
    def page(self, gateway: Any, browser: Browser) -> Iterator[Page]:
        """The page of the gateway; at the end it must have complained of nothing, and asked no one else."""
        complaints: list[str] = []
        asked: set[str] = set()
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(gateway.url)
        expect(page.locator("#version")).to_have_text(__version__, timeout=LOOK_MS)
        yield page
        page.close()
        assert complaints == []
        own = {f"{gateway.url}/", f"{gateway.url}/status"}
        assert {url for url in asked if not url.startswith("data:")} == own

    @staticmethod
    def model(page: Page, name: str) -> Any:
        return page.locator(".model").filter(has=page.get_by_role("heading", name=name, exact=True))

    def test_models_instances_and_problems_are_shown(self, page: Page) -> None:
        assert self.model(page, "echo").locator(".chip").inner_text() == "ready"
        assert "parrot" in self.model(page, "echo").inner_text()
        assert self.model(page, "broken").locator(".chip").inner_text() == "failed"
        assert "The file is broken." in page.locator("#problems").inner_text()

    def test_a_stream_is_seen_to_run_and_to_end_without_a_reload(self, gateway: Any, page: Page) -> None:
        instance = self.model(page, "slow").locator(".instance")
        page.evaluate("window.isTheSame = true")
        with streaming(gateway, "slow"):
            expect(instance).to_contain_text("1 of 1", timeout=LOOK_MS)
            expect(page.locator("#busy")).to_have_text("1")
            expect(page.locator("#speed")).not_to_have_text("0.0", timeout=LOOK_MS)
        expect(instance).to_contain_text("0 of 1", timeout=LOOK_MS)
        assert page.evaluate("window.isTheSame")

    def test_the_memory_of_gpus_is_shown_where_there_are_any(self, page: Page) -> None:
        expect(page.locator("#gpu-card")).to_be_hidden()
        gpus = [
            {"index": index, "name": HOSTILE, "memory_bytes": 24 * 2**30, "memory_used_bytes": 4 * 2**30}
            for index in range(2)
        ]

        def add_gpus(route: Route) -> None:
            answer = route.fetch()
            route.fulfill(response=answer, json=answer.json() | {"gpus": gpus})

        page.route("**/status", add_gpus)
        expect(page.locator("#gpu-memory")).to_have_text("8.0 GiB / 48.0 GiB", timeout=LOOK_MS)
        assert page.title() == "gallama"
        page.unroute_all(behavior="wait")

    def test_a_hostile_name_is_a_text(self, page: Page) -> None:
        assert self.model(page, HOSTILE).count() == 1
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 1
        assert page.title() == "gallama"

    def test_it_fits_a_telephone(self, page: Page) -> None:
        page.set_viewport_size({"width": 375, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375

    def test_where_keys_are_set_a_key_is_the_password(
        self, browser: Browser, start_gateway: Callable[..., Any]
    ) -> None:
        gateway = start_gateway({}, load=[], wait=False, flags=["--api-key", "a-long-secret"])
        with gateway.client() as client:
            assert client.get("/").status_code == 401
        credentials: HttpCredentials = {"username": "anybody", "password": "a-long-secret"}
        with browser.new_context(http_credentials=credentials) as context, context.new_page() as page:
            page.goto(gateway.url)
            expect(page.locator("#live")).to_contain_text("up", timeout=LOOK_MS)

    def test_a_gateway_that_has_ended_is_seen_to_have(
        self, gateway: Any, browser: Browser, start_gateway: Callable[..., Any]
    ) -> None:
        page = browser.new_page()
        page.goto(gateway.url)
        expect(page.locator("#live")).to_contain_text("up", timeout=LOOK_MS)
        gateway.process.terminate()
        expect(page.locator("#live")).to_contain_text("no answer", timeout=LOOK_MS)
        page.close()
