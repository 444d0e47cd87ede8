"""From what a user calls a model to the file that holds it."""

from gallama.catalog.lookup import (
    UNKNOWN_MODEL,
    ResolvedModel,
    check_names,
    known_models,
    resolve_anew,
    resolve_model,
)

__all__ = ["UNKNOWN_MODEL", "ResolvedModel", "check_names", "known_models", "resolve_anew", "resolve_model"]
