"""Loading a folder, over the library's own classes on the ground."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gallama.config import ModelSpec  # noqa: E402
from gallama.engines import ENGINES, ignore_progress  # noqa: E402
from gallama.errors import GallamaError, InvalidConfig, ModelLoadFailed, NotEnoughMemory  # noqa: E402
from tests.engines.exllamav3.ground import PAGE, Ground, save_model  # noqa: E402

GIB = 2**30


def load_and_close(
    path: Path, report_progress: Callable[[float], None] = ignore_progress, **settings: Any
) -> int:
    """The length of the loaded model's context."""
    settings = {"model_id": str(path), "backend": "exllamav3", **settings}
    engine = ENGINES["exllamav3"](ModelSpec.model_validate(settings), path, report_progress)
    asyncio.run(engine.close())
    return engine.context_length


def test_progress_grows_from_the_draft_model_to_the_warm_up(
    ground: Ground, folder: Path, tmp_path: Path
) -> None:
    draft = save_model(tmp_path, voice=1, is_draft=True)
    told: list[float] = []
    load_and_close(folder, told.append, draft_model_id=str(draft))
    assert told == sorted(told)
    assert told[0] == 0.0
    assert told[-1] == 1.0
    assert len([part for part in told if part <= 0.1]) > 2


def test_a_folder_of_another_quantization_is_refused_by_name(ground: Ground, tmp_path: Path) -> None:
    save_model(tmp_path, quantization_config={"quant_method": "exl2"})
    with pytest.raises(InvalidConfig, match=r"exl2.*backend=exllamav2"):
        load_and_close(tmp_path)
    assert not ground.loads


def test_a_draft_model_of_another_quantization_is_refused_by_its_key(
    ground: Ground, folder: Path, tmp_path: Path
) -> None:
    draft = save_model(tmp_path, quantization_config={"quant_method": "awq"})
    with pytest.raises(InvalidConfig, match=r"`draft_model_id`.*awq"):
        load_and_close(folder, draft_model_id=str(draft))


def test_an_architecture_that_the_library_does_not_know_is_said(ground: Ground, tmp_path: Path) -> None:
    save_model(tmp_path, architectures=["FancyForCausalLM"])
    with pytest.raises(ModelLoadFailed, match="FancyForCausalLM"):
        load_and_close(tmp_path)


def test_a_config_with_a_key_missing_is_said(ground: Ground, tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadFailed, match="hidden_size"):
        load_and_close(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Insufficient VRAM in split for model and cache"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_too_little_memory_is_said_as_such(ground: Ground, folder: Path, error: Exception) -> None:
    ground.load_error = error
    with pytest.raises(NotEnoughMemory):
        load_and_close(folder)


def test_weights_that_the_library_cannot_read_fail_the_load(ground: Ground, folder: Path) -> None:
    ground.load_error = ValueError("No tensors found for model.layers.0 matching supported quantization")
    with pytest.raises(ModelLoadFailed, match="No tensors found"):
        load_and_close(folder)


def test_a_model_that_computes_no_numbers_is_not_loaded(ground: Ground, folder: Path) -> None:
    ground.is_spoiled = lambda text: True
    with pytest.raises(GallamaError, match="no numbers"):
        load_and_close(folder)


def test_tensor_parallel_is_refused_for_a_model_that_cannot_be_split(ground: Ground, tmp_path: Path) -> None:
    save_model(tmp_path, architectures=["Olmo3ForCausalLM"], sliding_window=256)
    with pytest.raises(InvalidConfig, match=r"`tp`.*Olmo3ForCausalLM"):
        load_and_close(tmp_path, tp=True)


def test_a_draft_model_of_another_family_is_refused(ground: Ground, folder: Path, tmp_path: Path) -> None:
    draft = save_model(tmp_path, is_draft=True)
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    one, other = list(words)[100:102]
    words[one], words[other] = words[other], words[one]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InvalidConfig, match="another vocabulary"):
        load_and_close(folder, draft_model_id=str(draft))


def test_the_draft_model_is_loaded_first_and_out_of_the_same_gigabytes(
    ground: Ground, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 4 * GIB * len(ground.loads))
    draft = save_model(tmp_path, voice=1, is_draft=True)
    load_and_close(folder, gpus=[20], draft_model_id=str(draft))
    small, large = ground.loads
    assert small["use_per_device"] == pytest.approx([20e9 / GIB])
    assert large["use_per_device"] == pytest.approx([20e9 / GIB - 4])
    assert large["draft_model"] is not None


def test_gigabytes_of_its_own_are_the_draft_model_s_alone(
    ground: Ground, folder: Path, tmp_path: Path
) -> None:
    draft = save_model(tmp_path, voice=1, is_draft=True)
    load_and_close(folder, gpus=[20], draft_model_id=str(draft), draft_gpus=[2])
    small, large = ground.loads
    assert small["use_per_device"] == pytest.approx([2e9 / GIB])
    assert large["use_per_device"] == pytest.approx([20e9 / GIB])


def test_what_the_library_prints_is_kept_from_standard_output(
    ground: Ground, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warm_up = ground.library.Model.warmup

    def print_and_warm_up(*arguments: Any, **named: Any) -> Any:
        print(" !! something")
        return warm_up(*arguments, **named)

    monkeypatch.setattr(ground.library.Model, "warmup", print_and_warm_up)
    load_and_close(folder)
    printed = capsys.readouterr()
    assert not printed.out
    assert "something" in printed.err


def test_the_draft_model_is_warmed_up_before_the_model_is_loaded(
    ground: Ground, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up = ground.library.Model.warmup
    loaded: list[int] = []

    def note_and_warm_up(*arguments: Any, **named: Any) -> Any:
        loaded.append(len(ground.loads))
        return warm_up(*arguments, **named)

    monkeypatch.setattr(ground.library.Model, "warmup", note_and_warm_up)
    load_and_close(folder, draft_model_id=str(save_model(tmp_path, voice=1, is_draft=True)))
    assert loaded == [1, 2]


def test_the_context_is_that_of_the_model_s_config(ground: Ground, folder: Path) -> None:
    assert load_and_close(folder) == 1024
    assert load_and_close(folder, max_seq_len=700) == 700


def test_a_cache_may_be_smaller_than_a_chunk(ground: Ground, folder: Path, tmp_path: Path) -> None:
    draft = save_model(tmp_path, voice=1, is_draft=True)
    load_and_close(folder, max_seq_len=200, draft_model_id=str(draft))
    assert [load["max_chunk_size"] for load in ground.loads] == [PAGE, PAGE]


def test_a_cache_of_each_quantization_can_be_had(ground: Ground, folder: Path) -> None:
    for settings in ({"cache_quant": "Q6"}, {"backend_extra_args": {"cache_bits": "5,3"}}):
        assert load_and_close(folder, **settings) == 1024
