"""Which paths manage models rather than ask them: where there are admin keys, only these open them."""

from __future__ import annotations

MANAGEMENT_PATHS = (
    "add_model",
    "task_status",
    "remove_model",
    "stop_model_by_port",
    "list_models",
    "list_loaded_models",
    "list_available_models",
    "loading_status",
    "download_model",
)
"""The first part of each path; each also stands behind /v1. The id of a task follows `task_status`."""
