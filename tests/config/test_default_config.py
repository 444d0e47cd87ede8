import re
import stat
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gallama.config import ModelSpec, default_config_text, read_config_file, write_default_config
from gallama.config.server_config import ServerSettings
from gallama.errors import InvalidConfig

EXAMPLE = Path(__file__).parents[2] / "model_config.yaml.example"


def without_comment_signs(text: str) -> str:
    return re.sub(r"^# ", "", text, flags=re.MULTILINE)


def test_the_example_in_the_repository_is_the_generated_one() -> None:
    assert EXAMPLE.read_text(encoding="utf-8") == default_config_text()


def test_the_first_config_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model_config.yaml"
    write_default_config(path)
    assert read_config_file(path).models == {}


def test_every_setting_that_the_example_shows_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    path.write_text(without_comment_signs(default_config_text()), encoding="utf-8")
    config = read_config_file(path)
    assert config.models["my-model"].gpus == (22.0, 22.0, 10.0, 0.0)
    assert config.api_keys == ("a-long-secret",)


def test_the_example_shows_exactly_the_keys_that_exist() -> None:
    shown = YAML(typ="safe", pure=True).load(without_comment_signs(default_config_text()))
    assert list(shown["_server"]) == list(ServerSettings.model_fields)
    assert list(shown["my-model"]) == list(ModelSpec.model_fields)


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model_config.yaml"
    write_default_config(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    path.write_text("mine")
    with pytest.raises(InvalidConfig, match="cannot be created: File exists"):
        write_default_config(path)
    assert path.read_text() == "mine"
