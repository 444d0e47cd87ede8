from pathlib import Path

import pytest

from gallama.config import default_config_path, find_config_file, read_config_file
from gallama.errors import InvalidConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "model_config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problem(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(InvalidConfig) as raised:
        read_config_file(path)
    return raised.value.message.replace(str(path), "FILE")


def test_the_folder_is_in_the_home_unless_the_environment_moves_it(tmp_path: Path) -> None:
    assert default_config_path({}) == Path.home() / ".gallama" / "model_config.yaml"
    assert default_config_path({"GALLAMA_HOME": str(tmp_path)}) == tmp_path / "model_config.yaml"


def test_the_yaml_file_is_found_before_the_yml_one(tmp_path: Path) -> None:
    environment = {"GALLAMA_HOME": str(tmp_path)}
    assert find_config_file(environment) is None
    (tmp_path / "model_config.yml").touch()
    assert find_config_file(environment) == tmp_path / "model_config.yml"
    (tmp_path / "model_config.yaml").touch()
    assert find_config_file(environment) == tmp_path / "model_config.yaml"


@pytest.mark.parametrize("text", ["", "# nothing\n", "_server:\n_global:\n"])
def test_an_empty_file_means_defaults(tmp_path: Path, text: str) -> None:
    config = read_config_file(write(tmp_path, text))
    assert (config.host, config.port, config.api_keys, config.strict) == ("127.0.0.1", 8000, (), False)
    assert config.max_body_bytes == 32 * 1024 * 1024
    assert config.models == {}


def test_server_settings_and_models_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "_server: {port: 9000, api_keys: [one, two], strict: yes}\n"
        "mistral:\n  model_id: /models/mistral.gguf\n  gpus: 22,22\n  backend: Llama_cpp\n",
    )
    config = read_config_file(path)
    assert (config.port, config.api_keys, config.strict, config.file) == (9000, ("one", "two"), True, path)
    assert config.models["mistral"].gpus == (22.0, 22.0)
    assert config.models["mistral"].backend == "llama_cpp"


def test_a_model_has_the_name_of_its_section_unless_it_says_otherwise(tmp_path: Path) -> None:
    config = read_config_file(write(tmp_path, "a: {model_id: x.gguf}\nb: {model_name: c}\nd:\n"))
    assert [spec.model_name for spec in config.models.values()] == ["a", "c", "d"]
    assert [spec.model_id for spec in config.models.values()] == ["x.gguf", "b", "d"]


def test_global_keys_are_merged_under_each_model(tmp_path: Path) -> None:
    config = read_config_file(
        write(
            tmp_path,
            "_global: {cache_quant: Q8, default_sampling: {temperature: 0.5, top_p: 0.9}}\n"
            "a:\n"
            "b: {cache_quant: Q4, default_sampling: {temperature: 1}}\n",
        )
    )
    assert config.models["a"].cache_quant == "Q8"
    assert config.models["b"].cache_quant == "Q4"
    assert config.models["b"].default_sampling.temperature == 1.0
    assert config.models["b"].default_sampling.top_p == 0.9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a:\n  cache_quant: Q5\n",
            "FILE, line 2, `a.cache_quant`: 'Q5' is not allowed; use one of: FP16, Q8, Q6, Q4",
        ),
        ("a:\n  cach_size: 5\n", "FILE, line 2, `a.cach_size`: unknown key `cach_size`. Did you mean"),
        ("a:\n  gpus:\n  - 1\n  - -1\n", "FILE, line 2, `a.gpus`: must be `auto` or gigabytes"),
        ("a:\n  default_sampling:\n    top_p: 2\n", "FILE, line 3, `a.default_sampling.top_p`: must be less"),
        ("_server:\n\n  prot: 1\n", "FILE, line 3, `_server.prot`: unknown key `prot`. Did you mean `port`?"),
        ("_server:\n  port: 70000\n", "FILE, line 2, `_server.port`: must be less than or equal to 65535"),
        ("_server: {max_loaded_model: 2}\n", "unknown key `max_loaded_model`"),
        ("_global:\n  cache_sizes: 1\n", "FILE, line 2, `_global.cache_sizes`: unknown key"),
        ("_global:\n  model_id: x\n", "FILE, line 2, `_global.model_id`: `model_id` belongs to one model"),
        ("a: 1\n_servr: {}\n", "FILE, line 1, `a`: must be a mapping"),
        ("a:\n_servr: {}\n", "FILE, line 2, `_servr`: unknown key `_servr`. Did you mean `_server`?"),
        ("a:\n1: {}\n", "the name 1 is no text; put it in quotes"),
        ("- a\n", "FILE: must be a mapping from model names to settings, not list"),
        ("a:\n  b: [1\n", "FILE, line 3: this is not valid YAML"),
        ("a:\n  tp: false\n  tp: false\n", "FILE, line 3: this is not valid YAML: found duplicate key"),
        ("a: !!python/object:os.system {}\n", "FILE, line 1: this is not valid YAML"),
        ("a: \x01\n", "FILE: this is not valid YAML"),
        ("[" * 5000, "FILE: this is not valid YAML"),
        ("a:\n  backend_extra_args: {day: 2024-01-01}\n", "FILE, line 2, `a.backend_extra_args"),
        ('"a\\nb": {model_id: x}\n', "must be printable text"),
    ],
)
def test_what_is_wrong_is_told_with_line_and_key(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text)


def test_a_file_that_is_no_text_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidConfig, match="not valid YAML"):
        read_config_file(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"missing\.yaml cannot be read: No such file"):
        read_config_file(tmp_path / "missing.yaml")


@pytest.mark.parametrize("keys", ["[12345678]", "{a: 12345678}", "[' 12345678']", '["12345678\\n"]'])
def test_an_api_key_is_never_part_of_a_message(tmp_path: Path, keys: str) -> None:
    message = problem(tmp_path, f"_server:\n  api_keys: {keys}\n")
    assert "FILE, line 2, `_server.api_keys" in message
    assert "12345678" not in message


def test_an_api_key_is_no_part_of_a_printed_config(tmp_path: Path) -> None:
    config = read_config_file(write(tmp_path, "_server: {api_keys: [secret-key]}\n"))
    assert "secret-key" not in f"{config} {config!r}"
