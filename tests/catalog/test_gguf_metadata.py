"""A GGUF header is read within bounds, whatever it holds."""

import os
import random
import struct
from pathlib import Path

import pytest

from gallama.catalog.gguf_metadata import read_gguf_metadata
from gallama.errors import InvalidConfig

U8, I32, U32, F32, BOOL, TEXT, ARRAY, U64 = 0, 5, 4, 6, 7, 8, 9, 10
NONSENSE_TYPE = 4711


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def pair(name: str, value_type: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + value


def number(name: str, value: int) -> bytes:
    return pair(name, U32, struct.pack("<I", value))


def array(name: str, item_type: int, count: int, items: bytes) -> bytes:
    return pair(name, ARRAY, struct.pack("<IQ", item_type, count) + items)


def numbers(name: str, values: list[int]) -> bytes:
    return array(name, I32, len(values), struct.pack(f"<{len(values)}i", *values))


def small_model(**changes: bytes) -> dict[str, bytes]:
    """The pairs of a model of two layers; a change of the same key takes the place of one."""
    return {
        "architecture": pair("general.architecture", TEXT, text("llama")),
        "block_count": number("llama.block_count", 2),
        "context_length": number("llama.context_length", 4096),
        "embedding_length": number("llama.embedding_length", 64),
        "feed_forward_length": number("llama.feed_forward_length", 256),
        "head_count": number("llama.attention.head_count", 4),
        "tokens": array("tokenizer.ggml.tokens", TEXT, 3, text("a") + text("b") + text("")),
        **changes,
    }


def write(
    path: Path,
    pairs: dict[str, bytes],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int = 1,
    count: int | None = None,
    rest: bytes = bytes(1000),
) -> Path:
    count = len(pairs) if count is None else count
    path.write_bytes(magic + struct.pack("<IQQ", version, tensors, count) + b"".join(pairs.values()) + rest)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_the_measures_of_the_embedded_model_are_read(smollm2_path: Path) -> None:
    metadata = read_gguf_metadata(smollm2_path)
    assert metadata.architecture == "llama"
    assert metadata.context_length == 8192
    assert metadata.embedding_length == 576
    assert metadata.head_counts_kv == (3,) * 30
    assert (metadata.key_length, metadata.value_length) == (64, 64)
    assert metadata.vocabulary_size == 49152
    assert metadata.tensor_bytes == pytest.approx(smollm2_path.stat().st_size, rel=0.02)
    assert metadata.tensor_bytes < smollm2_path.stat().st_size


def test_what_a_file_leaves_out_has_llama_cpps_defaults(file: Path) -> None:
    metadata = read_gguf_metadata(write(file, small_model()))
    assert metadata.head_counts_kv == (4, 4)
    assert (metadata.key_length, metadata.value_length) == (16, 16)
    assert metadata.vocabulary_size == 3
    assert not metadata.has_window
    assert metadata.state_length == 0
    assert metadata.tensor_bytes == 1000


def test_heads_may_differ_from_layer_to_layer(file: Path) -> None:
    pairs = small_model(kv=numbers("llama.attention.head_count_kv", [0, 2]))
    assert read_gguf_metadata(write(file, pairs)).head_counts_kv == (0, 2)


def test_experts_that_work_at_once_count_together(file: Path) -> None:
    pairs = small_model(
        one=number("llama.expert_feed_forward_length", 128), used=number("llama.expert_used_count", 8)
    )
    assert read_gguf_metadata(write(file, pairs)).feed_forward_length == 1024


def test_keys_of_other_architectures_do_not_count(file: Path) -> None:
    pairs = small_model(other=number("bert.block_count", 7))
    assert len(read_gguf_metadata(write(file, pairs)).head_counts_kv) == 2


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    first = write(tmp_path / "a-00001-of-00002.gguf", small_model())
    (tmp_path / "a-00002-of-00002.gguf").write_bytes(bytes(500))
    assert read_gguf_metadata(first).tensor_bytes == 1500


def test_a_state_is_measured(file: Path) -> None:
    sizes = {"conv_kernel": 4, "inner_size": 128, "state_size": 16, "group_count": 1}
    pairs = small_model(**{name: number(f"llama.ssm.{name}", size) for name, size in sizes.items()})
    assert read_gguf_metadata(write(file, pairs)).state_length == 3 * (128 + 2 * 16) + 128 * 16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": b""}, "does not say 'general.architecture'"),
        ({"architecture": number("general.architecture", 1)}, "wrong type"),
        ({"architecture": array("general.architecture", U8, 2, b"ab")}, "wrong type"),
        ({"architecture": pair("general.architecture", TEXT, text("a\x1b[31m"))}, "cannot be"),
        ({"architecture": pair("general.architecture", TEXT, text("a" * 65))}, "64 is the most"),
        ({"block_count": b""}, "does not say llama.block_count"),
        ({"block_count": number("llama.block_count", 10**6)}, "4096 is the most"),
        ({"block_count": pair("llama.block_count", I32, struct.pack("<i", -1))}, "-1 for"),
        ({"block_count": pair("llama.block_count", TEXT, text("2"))}, "wrong type"),
        ({"block_count": pair("llama.block_count", F32, struct.pack("<f", 2))}, "wrong type"),
        ({"block_count": numbers("llama.block_count", [2, 2])}, "wrong type"),
        ({"kv": numbers("llama.attention.head_count_kv", [1] * 3)}, "3 values for 2 layers"),
        ({"kv": array("llama.attention.head_count_kv", I32, 2**63, b"")}, "4096 is the most"),
        ({"tokens": array("tokenizer.ggml.tokens", TEXT, 2**63, b"")}, "more than 2000000 texts"),
        ({"tokens": array("tokenizer.ggml.tokens", U8, 2**63, b"")}, "ends in the middle"),
        ({"tokens": array("tokenizer.ggml.tokens", ARRAY, 1, bytes(12) * 8)}, "unknown type 9"),
        ({"more": pair("x", NONSENSE_TYPE, b"")}, "unknown type 4711"),
        ({"more": pair("x", TEXT, struct.pack("<Q", 2**63))}, "ends in the middle"),
        ({"more": text("x" * 70_000)}, "65535 is the most"),
        ({"more": number("llama.block_count", 2)}, "twice"),
        ({"more": b"".join(number(f"a{n}.block_count", 1) for n in range(300))}, "several models"),
    ],
)
def test_metadata_that_cannot_be_are_refused(file: Path, changes: dict[str, bytes], reason: str) -> None:
    pairs = {name: value for name, value in small_model(**changes).items() if value}
    count = len(pairs) + 299 if reason == "several models" else None
    with pytest.raises(InvalidConfig, match=reason):
        read_gguf_metadata(write(file, pairs, count=count))


def test_a_file_that_is_no_gguf_file_is_refused(file: Path) -> None:
    with pytest.raises(InvalidConfig, match="does not begin with the letters GGUF"):
        read_gguf_metadata(write(file, small_model(), magic=b"GGML"))


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions_are_refused(file: Path, version: int) -> None:
    with pytest.raises(InvalidConfig, match=f"GGUF version {version}; versions 2 and 3"):
        read_gguf_metadata(write(file, small_model(), version=version))


@pytest.mark.parametrize("counts", [{"tensors": 2**63}, {"count": 2**63}, {"count": 2**64 - 1}])
def test_counts_beyond_reason_are_refused(file: Path, counts: dict[str, int]) -> None:
    with pytest.raises(InvalidConfig, match="is the most"):
        read_gguf_metadata(write(file, small_model(), **counts))  # type: ignore[arg-type]


def test_metadata_as_large_as_a_model_are_refused(file: Path) -> None:
    write(file, small_model(more=array("x", U8, 2**30, b"")))
    os.truncate(file, 2**31)  # a hole, which takes no room
    with pytest.raises(InvalidConfig, match="more than 128 MiB"):
        read_gguf_metadata(file)


def test_a_reason_cannot_forge_lines_of_a_log(file: Path) -> None:
    pairs = small_model(more=pair("x\r\n\x1b[2J.block_count", TEXT, text("")))
    with pytest.raises(InvalidConfig) as error:
        read_gguf_metadata(write(file, pairs))
    assert error.value.message.isprintable()


def test_what_is_no_ordinary_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InvalidConfig, match="no ordinary file"):
        read_gguf_metadata(tmp_path / "pipe.gguf")


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot be read: No such file"):
        read_gguf_metadata(tmp_path / "gone.gguf")


def test_a_header_cut_anywhere_is_refused(file: Path) -> None:
    whole = write(file, small_model(), rest=b"").read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(InvalidConfig, match="damaged or no language model"):
            read_gguf_metadata(file)


def test_damage_to_a_real_header_ends_in_measures_or_in_our_error(smollm2_path: Path, file: Path) -> None:
    rng = random.Random(0)
    with smollm2_path.open("rb") as content:
        whole = content.read(2 << 20)
    # What has most structure comes first: that is where most of the damage goes.
    for _ in range(60):
        header = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randint(0, 8)):
            place = rng.randrange(min(len(header), rng.choice([100, 4000, len(whole)])) or 1)
            header[place : place + 1] = rng.choice(
                [b"", b"\xff", b"\x00", rng.randbytes(1), rng.randbytes(9)]
            )
        file.write_bytes(header)
        try:
            metadata = read_gguf_metadata(file)
        except InvalidConfig:
            continue
        assert metadata.tensor_bytes <= len(header)


def test_random_pairs_end_in_measures_or_in_our_error(file: Path) -> None:
    rng = random.Random(1)
    for _ in range(500):
        pairs = dict(rng.sample(list(small_model().items()), k=7))
        for name in rng.sample(list(pairs), k=rng.randint(0, 3)):
            pairs[name] = bytes(pairs[name][: rng.randrange(len(pairs[name]))]) + rng.randbytes(
                rng.randint(0, 16)
            )
        write(file, pairs, count=rng.choice([7, 7, 7, 0, 8, 2**40]))
        try:
            metadata = read_gguf_metadata(file)
        except InvalidConfig:
            continue
        assert metadata.architecture == "llama"
