"""`gallama plan`: what a model would take, and whether it fits."""

import json
from pathlib import Path
from typing import Any

import pytest

from gallama.catalog import resolve_model
from gallama.cli import main
from gallama.cli.plan import Plan, lines, plan_memory, to_json
from gallama.config import ServerConfig
from gallama.errors import InvalidConfig
from gallama.pool.gpus import GIGABYTE, Gpu

NO_GPUS = "-1"


@pytest.fixture(autouse=True)
def _hidden_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", NO_GPUS)


def planned(*free: float, main_memory: float = 8, **values: Any) -> Plan:
    """The plan for the embedded model on GPUs with so many gigabytes free."""
    gpus = [
        Gpu(index=index, name="card", total_bytes=24 * GIGABYTE, free_bytes=int(size * GIGABYTE))
        for index, size in enumerate(free)
    ]
    model = resolve_model({"model_id": "smollm2-135m", **values}, ServerConfig())
    return plan_memory(model, gpus, int(main_memory * GIGABYTE))


def test_a_model_that_fits_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smollm2-135m"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("smollm2-135m needs about:\n")
    assert "weights          97 MB" in out
    assert out.endswith("It fits.\n")


def test_a_model_that_does_not_fit_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    whole = "cache_size=1000000000 backend_extra_args.kv_unified=true"
    assert main(["plan", f"model_id=smollm2-135m {whole}"]) == 1
    out = capsys.readouterr().out
    assert "cache        23040.0 GB" in out
    assert out.endswith("which is too little\nIt does not fit.\n")


def test_what_cannot_be_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model_id=gone.gguf"]) == 2
    assert "There is no model 'gone.gguf'" in capsys.readouterr().err
    assert main(["plan", "model_id=smollm2-135m gpu=1"]) == 2
    assert "unknown key `gpu`. Did you mean `gpus`?" in capsys.readouterr().err


def test_the_plan_as_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smollm2-135m", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    needs = told["needs"]
    parts = ("weight_bytes", "cache_bytes", "compute_bytes", "draft_model_bytes", "process_bytes")
    assert sum(needs[part] for part in parts) == needs["total_bytes"]
    assert [memory["memory"] for memory in told["memories"]] == ["main memory"]
    assert told["memories"][0]["needed_bytes"] == needs["total_bytes"]
    assert (told["fits"], told["problem"]) == (True, "")


def test_the_config_file_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("small: {model_id: smollm2-135m, max_seq_len: 256, cache_size: 256}\n")
    assert main(["plan", "small", "--config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needs"]["cache_bytes"] == 256 * 23040


def test_a_model_on_gpus_leaves_main_memory_to_the_process() -> None:
    plan = planned(24, 20)
    assert [share.memory for share in plan.shares] == ["GPU 0 (card)", "main memory"]
    assert plan.shares[1].needed_bytes == plan.need.process_bytes
    assert plan.fits


def test_instances_are_placed_one_after_the_other() -> None:
    plan = planned(2, 1.8, replicas=3)
    assert [share.memory for share in plan.shares] == ["GPU 0 (card)", "GPU 1 (card)", "main memory"]
    assert all(share.fits for share in plan.shares)
    assert lines(plan)[0] == "smollm2-135m needs about, for each of its instances:"


def test_the_instance_that_has_no_room_is_named() -> None:
    plan = planned(2, replicas=3)
    assert not plan.fits
    assert plan.problem.startswith("Instance 3 of 3: smollm2-135m needs 0.3 GB of GPU memory")
    assert lines(plan)[-1] == plan.problem
    assert to_json(plan)["memories"] == []


def test_gigabytes_that_are_asked_for_are_held_against_what_is_free() -> None:
    plan = planned(24, 0.5, gpus="0,1")
    assert not plan.fits
    assert any("GPU 1 (card): " in line and line.endswith("too little") for line in lines(plan))


def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InvalidConfig, match="on GPU 1, but there are only 1"):
        planned(24, gpus="0,1")


def test_gpus_that_cannot_be_seen_are_named_as_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    plan = planned(gpus="0,20")
    assert (plan.fits, plan.unseen_gpus, to_json(plan)["unseen_gpus"]) == (True, (1,), [1])
    assert lines(plan)[-2:] == [
        "GPU 1: not seen from here, so not judged",
        "It fits, as far as can be seen.",
    ]


def test_a_model_on_the_cpu_needs_main_memory() -> None:
    plan = planned(24, gpus="0", main_memory=0.1)
    assert [(share.memory, share.fits) for share in plan.shares] == [("main memory", False)]


def test_an_engine_without_a_model_needs_nothing(tmp_path: Path) -> None:
    model = resolve_model({"model_id": str(tmp_path), "backend": "scripted"}, ServerConfig())
    plan = plan_memory(model, [], 0)
    assert plan.fits
    assert "total             0 MB" in "\n".join(lines(plan))


class TestAModelThatNeedsGpus:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """An EXL3 model of 8 GB, as far as its head says."""
        tensor = {"dtype": "I16", "shape": [4 * 10**9], "data_offsets": [0, 8 * 10**9]}
        head = json.dumps({"model.layers.0.mlp.up_proj.trellis": tensor}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    def test_takes_nothing_of_main_memory_for_its_weights(self, folder: Path) -> None:
        plan = planned(24, model_id=str(folder))
        gpu, main_memory = plan.shares
        assert gpu.needed_bytes > 8 * GIGABYTE
        assert main_memory.needed_bytes < 2 * GIGABYTE
        assert (plan.fits, plan.unseen_gpus) == (True, ())

    def test_is_split_where_one_gpu_is_too_small(self, folder: Path) -> None:
        shares = planned(6, 6, model_id=str(folder)).shares
        assert [share.memory for share in shares] == ["GPU 0 (card)", "GPU 1 (card)", "main memory"]

    def test_does_not_fit_gpus_that_are_too_small_together(self, folder: Path) -> None:
        assert "needs 8.0 GB of GPU memory" in planned(3, 3, model_id=str(folder)).problem

    def test_is_not_judged_where_no_gpu_is_seen(self, folder: Path) -> None:
        text = lines(planned(main_memory=4, model_id=str(folder)))
        assert text[-2:] == ["GPU 0: not seen from here, so not judged", "It fits, as far as can be seen."]
