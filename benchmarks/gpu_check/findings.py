"""What a stage finds, kept in a file as it is found: a stage that is stopped loses nothing that it knew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Findings:
    """Of one stage: checks that hold or not, figures, and the rows of a table."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._checks: dict[str, Row] = {}
        self._figures: Row = {}
        self._table: list[Row] = []
        self._save()

    def check(self, name: str, held: bool, **figures: Any) -> None:
        print(f"{'held' if held else 'FAILED'}: {name} {figures or ''}", flush=True)
        self._checks[name] = {"held": held, **figures}
        self._save()

    def figure(self, name: str, value: Any) -> None:
        print(f"{name}: {value}", flush=True)
        self._figures[name] = value
        self._save()

    def row(self, row: Mapping[str, Any]) -> None:
        print(row, flush=True)
        self._table.append(dict(row))
        self._save()

    def _save(self) -> None:
        found = {"checks": self._checks, **self._figures}
        if self._table:
            found["table"] = self._table
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps(found))
        beside.replace(self.file)


def read_findings(file: Path) -> Row:
    """{"checks": ...} and whatever else was found; no checks where the stage never came to any."""
    found: Row = json.loads(file.read_text()) if file.exists() else {"checks": {}}
    return found
