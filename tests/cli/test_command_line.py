import subprocess
import sys
from pathlib import Path

import pytest

import gallama
from gallama.cli import main


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"gallama {gallama.__version__}\n"


@pytest.mark.parametrize(
    "argv", [[], ["srve"], ["serve", "--por", "1"], ["serve", "--admin-keys", "x"], ["run"]]
)
def test_a_command_line_that_does_not_exist_is_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


def test_a_mistake_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gallama", "serve", "-id", "model_id=none", "--config"]
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [*command, str(tmp_path / "none.yaml")], capture_output=True, text=True, cwd=root, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("gallama: The config file ")
    assert len(ended.stderr.splitlines()) == 1
