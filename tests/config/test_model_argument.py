import random
import string

import pytest

from gallama.config import parse_model_argument
from gallama.errors import InvalidConfig


def problem(text: str) -> str:
    with pytest.raises(InvalidConfig) as raised:
        parse_model_argument(text)
    return raised.value.message


def test_pairs_stand_between_blanks() -> None:
    assert parse_model_argument("  model_id=qwen2-72B \t gpus=22,22,10,0\ncache_quant=Q8 ") == {
        "model_id": "qwen2-72B",
        "gpus": "22,22,10,0",
        "cache_quant": "Q8",
    }


@pytest.mark.parametrize(
    "text",
    [
        'model_id="/my models/x.gguf"',
        "model_id='/my models/x.gguf'",
        '"model_id=/my models/x.gguf"',
        'model_id=/my" "models/x.gguf',
    ],
)
def test_quotes_keep_blanks_together(text: str) -> None:
    assert parse_model_argument(text) == {"model_id": "/my models/x.gguf"}


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_a_backslash_is_a_character_like_any_other(quote: str) -> None:
    text = rf"model_id={quote}C:\models\new.gguf{quote}"
    assert parse_model_argument(text) == {"model_id": r"C:\models\new.gguf"}


def test_a_value_may_hold_an_equals_sign_and_the_other_quote() -> None:
    assert parse_model_argument('''model_id="a=b's"''') == {"model_id": "a=b's"}


def test_any_value_without_double_quotes_survives_in_them() -> None:
    rng = random.Random(0)
    characters = string.printable.replace('"', "")
    for _ in range(300):
        value = "".join(rng.choices(characters, k=rng.randint(1, 30)))
        assert parse_model_argument(f'model_id="{value}"') == {"model_id": value}


def test_dotted_keys_make_nested_settings_of_numbers_booleans_and_text() -> None:
    text = (
        "model_id=m backend_extra_args.n_batch=512 backend_extra_args.rope.scale=0.5 "
        "backend_extra_args.use_mmap=False backend_extra_args.split=row backend_extra_args.tag='7' "
        "default_sampling.temperature=1e-1"
    )
    assert parse_model_argument(text) == {
        "model_id": "m",
        "backend_extra_args": {
            "n_batch": 512,
            "rope": {"scale": 0.5},
            "use_mmap": False,
            "split": "row",
            "tag": "7",
        },
        "default_sampling": {"temperature": 0.1},
    }


def test_a_name_of_digits_stays_text() -> None:
    assert parse_model_argument("model_id=m model_name=123")["model_name"] == "123"


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        (
            "model_id=m cach_size=1",
            "unknown key `cach_size`. Did you mean `cache_size`? Valid keys: aliases,",
        ),
        ("mistral", "'mistral' has no `=`; write key=value, as in model_id=mistral"),
        ("", "`model_id` is missing"),
        ("cache_size=1", "`model_id` is missing"),
        ("model_id=", "`model_id` has no value"),
        ("model_id=o'brien", "the quote ' is not closed"),
        ('model_id="x', 'the quote " is not closed'),
        ("model_id=m model_id=n", "`model_id` is given twice"),
        ("model_id=m cache_size.x=1", "`cache_size.x` has a dot, but `cache_size` holds one value"),
        ("model_id=m backend_extra_args=1", "write backend_extra_args.NAME=VALUE"),
        ("model_id=m backend_extra_args.=1", "write backend_extra_args.NAME=VALUE"),
        (
            "model_id=m backend_extra_args.a=1 backend_extra_args.a.b=2",
            "`backend_extra_args.a.b` goes into a setting that has a value already",
        ),
        (
            "model_id=m backend_extra_args.a.b=2 backend_extra_args.a=1",
            "`backend_extra_args.a` is given twice",
        ),
    ],
)
def test_what_cannot_be_read_is_explained(text: str, explanation: str) -> None:
    message = problem(text)
    assert message.startswith(f"-id {text!r}: ")
    assert explanation in message
