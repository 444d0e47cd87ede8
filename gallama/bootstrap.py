"""Runs a module of this very gallama in any interpreter, whether or not one is installed there.

    PYTHON -P gallama/bootstrap.py gallama.worker.__main__

So whoever starts a process and the process are always of the same version, and of the folders that gallama
lies in, often a whole site-packages, nothing but the package `gallama` can be imported. Knows nothing but the
standard library.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def command_of(python: str, module: str, *arguments: str) -> list[str]:
    """The command that runs the `main` of a module of gallama.

    Args:
        python: the interpreter.
        module: its `main()` returns the exit status.
        arguments: what it finds in `sys.argv[1:]`.
    """
    # -P: the folder of this file holds names like `logs` and `errors`, which others may mean otherwise.
    return [python, "-P", str(Path(__file__).resolve()), module, *arguments]


def import_gallama() -> None:
    """Let `import gallama` find the package that this file belongs to, and only that."""
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "gallama", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None, "a file that ends with .py has a loader"
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["gallama"] = package
    spec.loader.exec_module(package)


def main() -> int:
    import_gallama()
    try:
        module = importlib.import_module(sys.argv.pop(1))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "gallama":
            raise
        sys.exit(
            f"{sys.executable} has no module {error.name!r}, which gallama needs: install gallama there."
        )
    status: int = module.main()
    return status


if __name__ == "__main__":
    sys.exit(main())
