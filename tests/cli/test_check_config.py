from pathlib import Path

import pytest

from gallama.cli import main


def test_a_valid_file_is_called_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("demo: {model_id: smollm2-135m}\n")
    assert main(["check-config", str(path)]) == 0
    assert capsys.readouterr().out == f"{path} is valid. Models: demo.\n"


def test_without_a_name_the_file_that_serve_reads_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GALLAMA_HOME", str(tmp_path))
    assert main(["check-config"]) == 2
    assert "model_config.yaml; `gallama serve` creates it" in capsys.readouterr().err
    (tmp_path / "model_config.yml").write_text("_server: {port: 1}\n")
    assert main(["check-config"]) == 0
    assert "model_config.yml is valid. Models: none." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "m:\n  cache_quant: Q5\n",
            "line 2, `m.cache_quant`: 'Q5' is not allowed; use one of: FP16, Q8, Q6, Q4",
        ),
        ("m:\n  model_id: gone.gguf\n", "its model_id 'gone.gguf' is no file"),
    ],
)
def test_what_is_wrong_ends_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert main(["check-config", str(path)]) == 2
    assert expected in capsys.readouterr().err


def test_the_keys_file_is_checked_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, keys = tmp_path / "mine.yaml", tmp_path / "keys.yaml"
    path.write_text(f"_server: {{keys_file: {keys}}}\n")
    keys.write_text("- name: office\n  key: secret\n  rpm: 5\n")
    assert main(["check-config", str(path)]) == 2
    assert f"{keys}, line 3: unknown setting" in capsys.readouterr().err
    keys.write_text("- {name: office, key: secret}\n")
    assert main(["check-config", str(path)]) == 0
