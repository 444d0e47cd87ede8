"""From what a user calls a model to the file that holds it."""

from gallama.catalog.lookup import ResolvedModel, check_names, known_models, resolve_model

__all__ = ["ResolvedModel", "check_names", "known_models", "resolve_model"]
