from pathlib import Path

import pytest

from gallama.config import load_config
from gallama.errors import InvalidConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model_config.yaml"
    path.write_text("_server: {host: 0.0.0.0, port: 1111, strict: true}\nm: {model_id: x.gguf}\n")
    return path


def test_the_environment_overrides_the_file_and_flags_override_both(file: Path) -> None:
    config = load_config(file, {"GALLAMA_PORT": "2222", "GALLAMA_STRICT": "false"}, {"port": "3333"})
    assert (config.host, config.port, config.strict) == ("0.0.0.0", 3333, False)
    assert list(config.models) == ["m"]


def test_without_any_source_there_are_defaults() -> None:
    config = load_config(None, {"PATH": "/bin"}, {})
    assert (config.host, config.port, config.file) == ("127.0.0.1", 8000, None)


def test_api_keys_in_the_environment_stand_between_commas() -> None:
    assert load_config(None, {"GALLAMA_API_KEYS": "one, two"}, {}).api_keys == ("one", "two")


def test_the_variable_for_the_folder_is_no_setting() -> None:
    assert load_config(None, {"GALLAMA_HOME": "/somewhere"}, {}).port == 8000


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({"GALLAMA_PORT": "many"}, {}, "GALLAMA_PORT: must be a valid integer"),
        ({"GALLAMA_PORT": ""}, {}, "GALLAMA_PORT: must be a valid integer"),
        ({"GALLAMA_HOST": ""}, {}, "GALLAMA_HOST: must not be empty"),
        ({"GALLAMA_API_KEYS": ""}, {}, "GALLAMA_API_KEYS: "),
        ({"GALLAMA_STRICT": "perhaps"}, {}, "GALLAMA_STRICT: must be a valid boolean"),
        ({"GALLAMA_PROT": "1"}, {}, "unknown key `GALLAMA_PROT`. Did you mean `GALLAMA_PORT`? Valid keys:"),
        ({"GALLAMA_port": "1"}, {}, "unknown key `GALLAMA_port`. Did you mean `GALLAMA_PORT`?"),
        ({}, {"port": "99999"}, "--port: must be less than or equal to 65535; not '99999'"),
        ({}, {"api_keys": [""]}, "--api-key: "),
    ],
)
def test_what_is_wrong_is_told_with_its_source(
    environment: dict[str, str], flags: dict[str, object], expected: str
) -> None:
    with pytest.raises(InvalidConfig) as raised:
        load_config(None, environment, flags)
    assert expected in raised.value.message
