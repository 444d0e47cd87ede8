"""The file of keys: what it may say, and that no message tells a key."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from gallama.config.keys_file import MAX_FILE_BYTES, KeyEntry, read_keys_file
from gallama.errors import InvalidConfig

SECRET = "hunter2-secret"
DIGEST = hashlib.sha256(b"other").hexdigest()


def problem(folder: Path, text: str) -> str:
    path = folder / "keys.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidConfig) as caught:
        read_keys_file(path)
    return caught.value.report().message.replace(str(path), "FILE")


def test_a_key_may_be_given_by_itself_or_by_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"- {{name: office, key: schlüssel, requests_per_minute: 60, models: [a, b]}}\n"
        f"- name: operator\n  key_sha256: {DIGEST.upper()}\n  admin: true\n"
    )
    office, operator = read_keys_file(path)
    assert office.digest == hashlib.sha256("schlüssel".encode()).digest()
    assert (office.requests_per_minute, office.models, office.admin) == (60, ("a", "b"), False)
    assert operator.digest.hex() == DIGEST
    assert (operator.admin, operator.tokens_per_minute, operator.models) == (True, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "FILE: must be a list of keys"),
        ("[]", "FILE: must be a list of keys"),
        (f"name: {SECRET}\n", "FILE: must be a list of keys"),
        (f"- {SECRET}\n", "FILE, line 1: must be a mapping"),
        (f"- key: {SECRET}\n", "FILE, line 1, `name`: is missing"),
        (
            f"\n- name: a\n  key: {SECRET}\n  rpm: 1\n",
            "FILE, line 4: unknown setting. There are: admin, key,",
        ),
        (f"- name: a\n  {SECRET}: key\n", "FILE, line 2: unknown setting"),
        (f"- name: a\n  1: {SECRET}\n", "FILE, line 2: unknown setting"),
        ("- name: a\n", "FILE, line 1: needs either `key` or `key_sha256`"),
        (f"- {{name: a, key: {SECRET}, key_sha256: {DIGEST}}}", "needs either `key` or `key_sha256`"),
        (f"- name: a\n  key: {SECRET} x\n", "FILE, line 2, `key`: must not hold blanks"),
        (f"- name: a\n  key: [{SECRET}]\n", "FILE, line 2, `key`: must be a valid string"),
        ("- name: a\n  key: 123456\n", "FILE, line 2, `key`: must be a valid string"),
        (f"- name: a\n  key: '{SECRET}\x7f'\n", "FILE: this is not valid YAML"),
        (f'- name: a\n  key: "{SECRET}\\t"\n', "FILE, line 2, `key`: must be printable text"),
        (f"- name: a\n  key_sha256: {SECRET}\n", "FILE, line 2, `key_sha256`: must be 64 hexadecimal digits"),
        (f'- name: "a\\nb"\n  key: {SECRET}\n', "FILE, line 1, `name`: must be printable text"),
        (
            f"- name: {'a' * 101}\n  key: {SECRET}\n",
            "FILE, line 1, `name`: must have 100 characters or fewer",
        ),
        (
            f"- name: a\n  key: {SECRET}\n  tokens_per_minute: 0\n",
            "FILE, line 3, `tokens_per_minute`: must be",
        ),
        (f"- name: a\n  key: {SECRET}\n  admin: perhaps\n", "FILE, line 3, `admin`: must be a valid boolean"),
        (f"- {{name: a, key: {SECRET}, admin: true, models: [m]}}", "an admin key opens all models"),
        (f"- {{name: a, key: {SECRET}}}\n- {{name: a, key: x}}", "FILE, line 2: has the name of line 1"),
        (
            f"- {{name: a, key: {SECRET}}}\n- {{name: b, key: {SECRET}}}",
            "FILE, line 2: has the key of line 1",
        ),
        (f"- name: a\n  key: *{SECRET}\n", "FILE, line 2: this is not valid YAML: found an alias"),
        (f"- name: a\n  key: !{SECRET} x\n", "FILE, line 2: this is not valid YAML: found a tag"),
        (
            f"- name: a\n  key: {SECRET}\n  key: x{SECRET}\n",
            "FILE, line 3: this is not valid YAML: found dupl",
        ),
        (f"- name: a\n  key: !!int {SECRET}\n", "FILE: this is not valid YAML"),
        (f"!{SECRET}!x a: b\n", "FILE, line 1: this is not valid YAML: found undefined tag handle '…'"),
        (f"- &{SECRET} {{name: a, key: *{SECRET}}}\n", "FILE: this is not valid YAML"),
        ("[" * 5000, "FILE: this is not valid YAML"),
        ("# " + "x" * MAX_FILE_BYTES, f"is larger than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_without_the_key(
    tmp_path: Path, text: str, expected: str
) -> None:
    message = problem(tmp_path, text)
    assert expected in message
    assert SECRET not in message
    assert "123456" not in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"The keys file .*gone\.yaml cannot be read: No such file"):
        read_keys_file(tmp_path / "gone.yaml")


def test_a_file_that_is_no_text_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_bytes(b"- name: \xff\xfe\n")
    with pytest.raises(InvalidConfig, match="not UTF-8 text"):
        read_keys_file(path)


def test_an_entry_shows_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: a, key: {SECRET}}}\n- {{name: b, key_sha256: {DIGEST}}}\n")
    shown = repr(read_keys_file(path))
    assert SECRET not in shown
    assert DIGEST not in shown


DOCUMENT = (Path(__file__).parents[2] / "docs/keys.md").read_text()


def test_the_example_of_the_document_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(DOCUMENT.partition("```yaml\n")[2].partition("```")[0])
    assert [entry.name for entry in read_keys_file(path)] == ["office", "operator"]


def test_the_document_explains_every_setting() -> None:
    explained = re.findall(r"^\| `(\w+)` \|", DOCUMENT.partition("| Setting |")[2].partition("\n\n")[0], re.M)
    assert set(explained) == set(KeyEntry.model_fields)
