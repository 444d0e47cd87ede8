"""Runs stages one after the other, each in a process of its own with a limit of time, and sums up.

What came of each stage is kept, so that a check that needs more than one command goes on in the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.findings import read_findings

SCHEMA = 1
HELD, FAILED, NOT_RUN = "held", "failed", "not run"
LEAST_SECONDS = 10
"""A stage is not begun with less time than this."""
_END_SECONDS = 5
_TOLD_CHARACTERS = 1500
_TOLD_LINES = 12
_TELLING = re.compile(r"error[: ]|Error|FAILED|assert", re.ASCII)

Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    name: str
    """As in "v3.speed"."""
    seconds: float
    """It is stopped after that."""
    needs: tuple[str, ...] = ()
    """Stages that must have held before."""

    @property
    def engine(self) -> str:
        return self.name.partition(".")[0]


class Runner:
    """Runs stages within a limit of time for all of them."""

    def __init__(
        self,
        folder: Path,
        *,
        seconds: float,
        environment: Mapping[str, str],
        keep: Callable[[Mapping[str, Result]], None] = lambda results: None,
        command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu_check"),
    ) -> None:
        """
        Args:
            folder: of the results and logs; results that lie there count.
            environment: beside this process's own.
            keep: is given all results whenever one changes: this process may be ended at any moment.
            command: gets `stage NAME --file FILE --seconds N`.
        """
        self._folder = folder
        self._deadline = time.monotonic() + seconds
        self._environment = environment
        self._keep = keep
        self._command = command
        folder.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Result] = _read_results(folder)

    def run(self, stages: Sequence[Stage], *, again: bool) -> None:
        """Run those that have not held yet.

        Args:
            again: run those that have held, too.
        """
        for stage in stages:
            if again or self._status(stage.name) != HELD:
                print(f"=== {stage.name}", flush=True)
                self._run_one(stage)

    def _run_one(self, stage: Stage) -> None:
        seconds = min(stage.seconds, self._deadline - time.monotonic())
        if obstacle := self._obstacle(stage, seconds):
            print(obstacle, flush=True)
            # What it found when it ran is worth more than that it was not run again.
            if self._status(stage.name) != FAILED:
                self._set(stage, _not_run(obstacle))
        else:
            self._set(stage, {"status": FAILED, "why": "it was under way when the check was ended"})
            self._set(stage, self._result(stage, seconds))

    def _set(self, stage: Stage, result: Result) -> None:
        self.results[stage.name] = result
        _write_results(self._folder, self.results)
        self._keep(self.results)

    def _status(self, name: str) -> str:
        return str(self.results.get(name, {}).get("status", NOT_RUN))

    def _obstacle(self, stage: Stage, seconds: float) -> str | None:
        if unmet := [name for name in stage.needs if self._status(name) != HELD]:
            return f"{', '.join(unmet)} must hold first"
        if seconds < LEAST_SECONDS:
            return "no time was left; run it again, and it goes on from here"
        return None

    def _result(self, stage: Stage, seconds: float) -> Result:
        started = time.monotonic()
        file = self._folder / f"{stage.name}.found"
        file.unlink(missing_ok=True)
        log = self._folder / f"{stage.name}.log"
        code = self._run_process(stage, file, log, seconds)
        result = to_result(read_findings(file), code, tail(log), limit=seconds)
        return {**result, "seconds": round(time.monotonic() - started, 1), "date": _now()}

    def _run_process(self, stage: Stage, file: Path, log: Path, seconds: float) -> int | None:
        """The exit code; None: it was stopped."""
        command = [*self._command, "stage", stage.name, "--file", str(file), "--seconds", str(seconds)]
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
            print(tail(log), flush=True)


def to_result(found: Mapping[str, Any], code: int | None, log: str, *, limit: float) -> Result:
    """What a stage came to, of what it found and how it ended.

    Args:
        code: of its exit; None: it was stopped after `limit` seconds.
        log: the part of it that tells what went wrong.
    """
    failed = [name for name, check in found["checks"].items() if not check["held"]]
    if code is None:
        why = f"it was stopped after {limit:.0f} s"
    elif failed:
        why = f"{', '.join(failed)} did not hold"
    elif code:
        why = f"it ended with code {code}"
    elif not found["checks"]:
        why = "it checked nothing"
    else:
        return {"status": HELD, **found}
    return {"status": FAILED, "why": why, **found, "log": log}


def sum_up(
    results: Mapping[str, Result], stages: Sequence[Stage], versions: Mapping[str, Any]
) -> dict[str, Any]:
    """The one summary; a stage that never ran stands in it like all others."""
    told = {stage.name: results.get(stage.name) or _not_run("it was not asked for") for stage in stages}
    return {
        "gpu_check": SCHEMA,
        "date": _now(),
        "held": all(result["status"] == HELD for result in told.values()),
        "versions": dict(versions),
        "stages": told,
    }


def exit_code(summary: Mapping[str, Any], asked: Sequence[Stage]) -> int:
    """0 if all that was asked for holds."""
    return int(any(summary["stages"][stage.name]["status"] != HELD for stage in asked))


def tail(log: Path) -> str:
    """The lines of a log that look like errors, the first ones, and its last lines."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = text.splitlines()
    telling = [line[:300] for line in lines if _TELLING.search(line)][:_TOLD_LINES]
    return "\n".join([*telling, "...", text[-_TOLD_CHARACTERS:]]) if telling else text[-_TOLD_CHARACTERS:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it started; a compiler that is asked to end leaves no half-written file."""
    for wish in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, wish)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
            return


def _not_run(why: str) -> Result:
    return {"status": NOT_RUN, "why": why}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_results(folder: Path) -> dict[str, Result]:
    file = folder / "results.json"
    results: dict[str, Result] = json.loads(file.read_text()) if file.exists() else {}
    return results


def _write_results(folder: Path, results: Mapping[str, Result]) -> None:
    (folder / "results.json").write_text(json.dumps(results))
