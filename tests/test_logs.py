"""Lines of the log: one for each call, whatever is told of."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator

import pytest

from gallama.logs import JsonLines, LogFormat, TextLines, current_request_id, log_to_stderr, printable

HOSTILE = "a\r\n2026-01-01 00:00:00,000 ERROR forged: \x1b[31m\u2028\u202e\x00\ud800 b"


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(output: io.StringIO) -> Iterator[logging.Logger]:
    """A logger of its own, that writes text to `output`."""
    logger = logging.Logger("gallama.test")
    handler = logging.StreamHandler(output)
    handler.setFormatter(TextLines())
    logger.addHandler(handler)
    yield logger
    handler.close()


@pytest.fixture
def json_logger(logger: logging.Logger) -> logging.Logger:
    logger.handlers[0].setFormatter(JsonLines())
    return logger


def fail(message: str) -> None:
    raise ValueError(message)


class TestText:
    def test_a_line_says_when_how_bad_who_and_what(self, logger: logging.Logger, output: io.StringIO) -> None:
        logger.warning("%d models", 3)
        assert output.getvalue().split(" ", 2)[2] == "WARNING gallama.test: 3 models\n"

    def test_what_others_say_stays_on_one_line(self, logger: logging.Logger, output: io.StringIO) -> None:
        logger.info("No model is called %s", HOSTILE)
        line = output.getvalue().removesuffix("\n")
        assert line.isprintable()
        assert r"a\r\n2026" in line

    def test_a_traceback_cannot_forge_a_line(self, logger: logging.Logger, output: io.StringIO) -> None:
        try:
            fail(HOSTILE)
        except ValueError:
            logger.exception("It failed.")
        first, *others = output.getvalue().splitlines()
        assert first.endswith("ERROR gallama.test: It failed.")
        assert len(others) > 3
        assert all(line.startswith("    ") and line.isprintable() for line in others)


class TestJson:
    def test_a_line_is_an_object_with_what_the_call_gave(
        self, json_logger: logging.Logger, output: io.StringIO
    ) -> None:
        json_logger.info("done", extra={"model": HOSTILE, "seconds": 0.5, "request_id": "r-1"})
        (line,) = output.getvalue().splitlines()
        told = json.loads(line)
        assert told.pop("time").endswith("Z")
        assert told == {
            "level": "INFO",
            "logger": "gallama.test",
            "message": "done",
            "model": HOSTILE,
            "seconds": 0.5,
            "request_id": "r-1",
        }

    def test_a_traceback_is_a_field(self, json_logger: logging.Logger, output: io.StringIO) -> None:
        try:
            fail(HOSTILE)
        except ValueError:
            json_logger.exception("It failed: %s", HOSTILE)
        (line,) = output.getvalue().splitlines()
        assert line.isascii()
        assert json.loads(line)["message"] == f"It failed: {HOSTILE}"
        assert "in fail" in json.loads(line)["exception"]


@contextlib.contextmanager
def logging_set_up(log_format: LogFormat, *, is_verbose: bool = False) -> Iterator[None]:
    """Logging as in a process that has just begun, inside the context."""
    root, own = logging.getLogger(), logging.getLogger("gallama")
    handlers, level = root.handlers, own.level
    root.handlers = []
    try:
        log_to_stderr(log_format, is_verbose=is_verbose)
        yield
    finally:
        root.handlers = handlers
        own.setLevel(level)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_line_of_a_request_carries_its_id(
    log_format: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_set_up(log_format):
        token = current_request_id.set("r-7")
        logging.getLogger("gallama.any").info("inside")
        logging.getLogger("another.library").warning("inside too")
        current_request_id.reset(token)
        logging.getLogger("gallama.any").info("outside")
    lines = capsys.readouterr().err.splitlines()
    assert ["r-7" in line for line in lines] == [True, True, False]


def test_details_are_told_only_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_set_up("text"):
        logging.getLogger("gallama.any").debug("a detail")
    with logging_set_up("text", is_verbose=True):
        logging.getLogger("gallama.any").debug("another detail")
        logging.getLogger("another.library").info("not ours")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("another detail")


def test_a_printable_text_stays_as_it_is() -> None:
    assert printable("Grüße, 世界 🙂 \\n") == "Grüße, 世界 🙂 \\n"
