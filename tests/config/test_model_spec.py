import json
from typing import Any

import pytest

from gallama.config import ModelSpec, SamplingDefaults, layer_values, validated
from gallama.errors import InvalidConfig
from gallama.generation import SamplingSettings


def spec(**values: Any) -> ModelSpec:
    return validated(ModelSpec, {"model_id": "m", **values}, lambda keys: ".".join(map(str, keys)))


def problem(**values: Any) -> str:
    with pytest.raises(InvalidConfig) as raised:
        spec(**values)
    return raised.value.message


@pytest.mark.parametrize("backend", ["llama_cpp", "Llama_cpp", "LLAMA_CPP", "llama.cpp", "llama-cpp"])
def test_a_backend_is_read_in_any_case_and_spelling(backend: str) -> None:
    assert spec(backend=backend).backend == "llama_cpp"


@pytest.mark.parametrize("backend", ["exllama", "exLlama", "exl2"])
def test_exllama_means_its_second_version(backend: str) -> None:
    assert spec(backend=backend).backend == "exllamav2"


@pytest.mark.parametrize("gpus", ["22,22,10,0", "22, 22, 10, 0", [22, 22, 10, 0], ["22", 22, 10.0, 0]])
def test_gigabytes_per_gpu_are_read_from_text_and_from_a_list(gpus: object) -> None:
    assert spec(gpus=gpus).gpus == (22.0, 22.0, 10.0, 0.0)


@pytest.mark.parametrize("gpus", [20, "20", 20.0])
def test_one_number_is_the_first_gpu(gpus: object) -> None:
    assert spec(gpus=gpus).gpus == (20.0,)


@pytest.mark.parametrize("gpus", ["", "a,b", [], [-1], "nan", [float("inf")], True, {"0": 1}, None, [[1]]])
def test_gpus_that_are_no_sizes_are_refused(gpus: object) -> None:
    assert "gpus: must be `auto` or gigabytes per GPU as in 22,22,10,0" in problem(gpus=gpus)


def test_the_cache_is_rounded_up_to_whole_pages() -> None:
    assert spec(cache_size="1000").cache_size == 1024
    assert spec(cache_size=1024).cache_size == 1024


def test_the_cache_holds_at_least_one_longest_sequence() -> None:
    assert spec(cache_size=1000, max_seq_len=1024).cache_size == 1024
    assert "at least max_seq_len (4096), not 2048" in problem(cache_size=2048, max_seq_len=4096)


@pytest.mark.parametrize("size", [0, -1, "many", 1.5, True, float("nan"), 2**31, [1]])
def test_a_cache_size_that_is_no_count_of_tokens_is_refused(size: object) -> None:
    assert problem(cache_size=size).startswith("cache_size: ")


GPU_VALUES = [("tp", True), ("tp", "yes"), ("cache_quant", "Q6"), ("draft_cache_quant", "q6")]


@pytest.mark.parametrize(("key", "value"), GPU_VALUES)
def test_what_only_some_backends_have_is_refused_for_the_others(key: str, value: object) -> None:
    draft = {"draft_model_id": "small"} if key.startswith("draft") else {}
    message = problem(**{key: value}, **draft, backend="llama_cpp")
    assert f"`{key}` is {'true' if key == 'tp' else 'Q6'}, which the backend llama_cpp has not" in message
    assert f"leave `{key}` out, or use one of the backends: exllamav2, exllamav3" in message


@pytest.mark.parametrize("backend", ["auto", "exllama", "exllamav3"])
@pytest.mark.parametrize(("key", "value"), GPU_VALUES)
def test_what_only_some_backends_have_is_taken_for_these_and_where_it_may_yet_be_one(
    key: str, value: object, backend: str
) -> None:
    draft = {"draft_model_id": "small"} if key.startswith("draft") else {}
    assert getattr(spec(**{key: value}, **draft, backend=backend), key) in (True, "Q6")


@pytest.mark.parametrize("keys", [{"model_type": "Embedding"}, {"backend": "EMBEDDING"}])
def test_a_model_that_embeds_answers_more_requests_at_a_time(keys: dict[str, str]) -> None:
    assert spec(**keys).model_type == "embedding"
    assert spec(**keys).max_concurrent_requests == 64
    assert spec(**keys, max_concurrent_requests=3).max_concurrent_requests == 3


@pytest.mark.parametrize("backend", ["transformers", "exllama"])
def test_a_backend_that_does_not_embed_is_refused_for_a_model_that_does(backend: str) -> None:
    assert "does not embed; leave `backend` out" in problem(model_type="embedding", backend=backend)


def test_the_backend_that_embeds_is_refused_for_a_model_of_text() -> None:
    assert "makes no text; leave `model_type` out" in problem(model_type="llm", backend="embedding")


@pytest.mark.parametrize(
    "keys",
    [
        {"cache_size": 512},
        {"cache_quant": "Q8"},
        {"prompt_template": "chatml"},
        {"eos_token_list": ["</s>"]},
        {"default_sampling": {"top_k": 1}},
        {"speculative": "ngram"},
        {"draft_model_id": "small"},
    ],
)
def test_what_is_only_for_text_is_refused_for_a_model_that_embeds(keys: dict[str, object]) -> None:
    assert f"does not use `{next(iter(keys))}`" in problem(model_type="embedding", **keys)


def test_a_name_that_does_not_exist_is_answered_with_those_that_work() -> None:
    assert problem(cache_quant="Q5") == "cache_quant: 'Q5' is not allowed; use one of: FP16, Q8, Q6, Q4"


def test_the_test_engine_is_valid_but_not_advertised() -> None:
    assert spec(backend="scripted").backend == "scripted"
    assert "scripted" not in problem(backend="scriptd")


def test_an_unknown_key_is_answered_with_the_closest_one() -> None:
    message = problem(cach_size=1)
    assert "unknown key `cach_size`. Did you mean `cache_size`? Valid keys: aliases, backend," in message


def test_an_unknown_sampling_key_is_answered_with_the_sampling_keys() -> None:
    message = problem(default_sampling={"temprature": 1})
    assert "Did you mean `temperature`? Valid keys: frequency_penalty, min_p," in message


def test_all_problems_are_told_at_once() -> None:
    assert len(problem(cache_size=0, tp="maybe", colour="red").splitlines()) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
    ],
)
def test_sampling_defaults_have_the_ranges_of_a_request(key: str, value: object) -> None:
    assert problem(default_sampling={key: value}).startswith(f"default_sampling.{key}: ")


def test_sampling_defaults_complete_a_request() -> None:
    defaults = SamplingDefaults(temperature=0.2, top_k=40).to_settings()
    settings = SamplingSettings(temperature=1.0).with_defaults(defaults)
    assert (settings.temperature, settings.top_k, settings.top_p) == (1.0, 40, None)


@pytest.mark.parametrize("key", ["default_sampling", "backend_extra_args"])
def test_nested_settings_are_a_mapping(key: str) -> None:
    assert problem(**{key: "fast"}) == f"{key}: must be a mapping of keys to values"


@pytest.mark.parametrize("value", [float("nan"), [1, float("inf")], {"a": float("nan")}])
def test_backend_arguments_hold_what_json_can_carry(value: object) -> None:
    assert "finite" in problem(backend_extra_args={"x": value})


def test_lists_are_read_from_text_with_commas() -> None:
    assert spec(aliases="a, b", eos_token_list="<|im_end|>,</s>").aliases == ("a", "b")
    assert spec(eos_token_list="<|im_end|>,</s>").eos_token_list == ("<|im_end|>", "</s>")


@pytest.mark.parametrize("name", ["", " a", "a\n", "a\x00b"])
def test_a_name_is_printable_text(name: str) -> None:
    assert "model_name: must be printable text" in problem(model_name=name)


def test_a_spec_survives_the_way_to_the_worker() -> None:
    sent = spec(
        gpus="22,0",
        cache_size=1000,
        eos_token_list=["</s>"],
        default_sampling={"temperature": 0.2},
        backend_extra_args={"n_batch": 512, "nested": {"a": [1, 2.5, "x", None, True]}},
    )
    assert ModelSpec.model_validate_json(sent.model_dump_json()) == sent
    assert json.loads(sent.model_dump_json())["gpus"] == [22.0, 0.0]


def test_nested_settings_are_overridden_one_by_one() -> None:
    lower = {"cache_size": 1, "backend_extra_args": {"n_batch": 1, "n_threads": 2}}
    upper = {"cache_size": 3, "backend_extra_args": {"n_batch": 4}}
    assert layer_values(lower, upper) == {
        "cache_size": 3,
        "backend_extra_args": {"n_batch": 4, "n_threads": 2},
    }


@pytest.mark.parametrize(
    ("values", "speculation", "most_draft_tokens"),
    [
        ({}, "off", 0),
        ({"speculative": "off"}, "off", 0),
        ({"speculative": "ngram"}, "ngram", 15),
        ({"speculative": "auto"}, "ngram", 15),
        ({"speculative": "AUTO", "draft_model_id": "small"}, "draft", 8),
        ({"draft_model_id": "small"}, "draft", 8),
        ({"speculative": "draft", "draft_model_id": "small", "num_draft_tokens": "3"}, "draft", 3),
        ({"draft_model_id": "small", "backend": "exllamav2"}, "draft", 4),
        ({"speculative": "ngram", "backend": "exllamav2"}, "ngram", 4),
        ({"speculative": "ngram", "backend": "exllamav3"}, "ngram", 7),
        ({"speculative": "ngram", "backend": "exllamav3", "num_draft_tokens": 6}, "ngram", 6),
        ({"backend": "exllamav3"}, "off", 0),
    ],
)
def test_a_draft_model_drafts_unless_the_spec_says_otherwise(
    values: dict[str, Any], speculation: str, most_draft_tokens: int
) -> None:
    asked = spec(**values)
    assert (asked.speculation, asked.most_draft_tokens) == (speculation, most_draft_tokens)


def test_drafting_with_a_model_needs_one() -> None:
    assert "there is no `draft_model_id`; name a draft model" in problem(speculative="draft")


@pytest.mark.parametrize("speculative", ["ngram", "off"])
def test_a_draft_model_beside_another_way_of_guessing_is_refused(speculative: str) -> None:
    message = problem(speculative=speculative, draft_model_id="small", draft_gpus="0,8")
    assert "`draft_model_id`, `draft_gpus` would not be used" in message
    assert f"`speculative` is {speculative}; leave them out, or change it" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("draft_model_name", "small"),
        ("draft_gpus", "auto"),
        ("draft_cache_size", 1024),
        ("draft_cache_quant", "Q8"),
        ("num_draft_tokens", 4),
    ],
)
def test_how_to_draft_without_anything_that_drafts_is_refused(key: str, value: object) -> None:
    assert f"`{key}` would not be used: there is no `draft_model_id`" in problem(**{key: value})


@pytest.mark.parametrize("backend", ["scripted", "transformers"])
def test_an_engine_that_does_not_guess_ahead_is_not_told_to(backend: str) -> None:
    message = problem(speculative="ngram", backend=backend)
    assert f"the backend {backend} does not guess ahead; leave `speculative` and the draft's keys" in message


def test_a_batch_must_hold_a_draft() -> None:
    arguments = {"n_batch": 32}
    assert (
        spec(speculative="ngram", num_draft_tokens=16, backend_extra_args=arguments).most_draft_tokens == 16
    )
    message = problem(speculative="ngram", num_draft_tokens=17, backend_extra_args=arguments)
    assert "`backend_extra_args.n_batch` is 32" in message
    assert "`num_draft_tokens`: 17" in message


@pytest.mark.parametrize("count", [0, 65, "many", True])
def test_a_draft_has_a_length_within_bounds(count: object) -> None:
    assert problem(speculative="ngram", num_draft_tokens=count).startswith("num_draft_tokens: ")


def test_how_to_guess_ahead_survives_the_way_to_the_worker() -> None:
    sent = spec(draft_model_id="/small.gguf", draft_gpus="2,0", draft_cache_size=1000, draft_cache_quant="q8")
    assert ModelSpec.model_validate_json(sent.model_dump_json()) == sent
