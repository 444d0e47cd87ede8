"""The check on a GPU, as far as it goes without one: over the libraries' own generators on a CPU, too."""

from __future__ import annotations

import asyncio
import json
import lzma
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu_check import extension, models, places, speed, toolkit, wheels
from benchmarks.gpu_check.__main__ import bring_back, main, nvcc, select, take_back
from benchmarks.gpu_check.checks import check_broken_step, check_cancelling, check_load
from benchmarks.gpu_check.findings import Findings, read_findings
from benchmarks.gpu_check.libraries import LOOPS, break_a_step, break_next_call
from benchmarks.gpu_check.load import Written, problem_with, works
from benchmarks.gpu_check.runner import Runner, Stage, exit_code, sum_up, tail
from benchmarks.gpu_check.speed import Load, Ours, Turn, measure, to_rows
from benchmarks.gpu_check.stages import load_engine, read_report, stages
from gallama.errors import MissingExtra
from gallama.generation import Engine

ROOT = Path(__file__).parents[1]
STAGE = """
import json, subprocess, sys, time
from pathlib import Path
file = Path(sys.argv[sys.argv.index("--file") + 1])
name = sys.argv[2]
held = {"checks": {"it works": {"held": True, "figure": 3}}}
if name == "good":
    file.write_text(json.dumps(held))
elif name == "bad":
    file.write_text(json.dumps({"checks": {"it works": {"held": False}}}))
elif name == "broken":
    file.write_text(json.dumps(held))
    print("fatal error: no such header")
    sys.exit(3)
elif name == "slow":
    file.write_text(json.dumps(held))
    subprocess.run(["sleep", "61.0625"])
"""
SLEEP = "sleep 61.0625"
TOY_LIBRARY = """
import os
from pathlib import Path
folder = Path(os.environ["FOLDER"])
assert not (folder / "lock").exists(), "it would wait for ever"
(folder / "toy_ext.so").write_text("for " + os.environ["TORCH_CUDA_ARCH_LIST"])
raise RuntimeError("there is no GPU")
"""


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return Findings(tmp_path / "found")


def found(findings: Findings) -> dict[str, Any]:
    return read_findings(findings.file)


class TestPacking:
    def test_takes_what_is_needed_and_not_there(self, tmp_path: Path) -> None:
        index = Index({"a": ["b>=2", "there", "c; sys_platform == 'win32'", "d; extra == 'all'"], "b": ["a"]})
        packed = wheels.pack([Requirement("a")], tmp_path, index.fetch, there={"there"})
        assert [wheel.name for wheel in packed] == ["a-1-py3-none-any.whl", "b-2-py3-none-any.whl"]

    def test_asks_for_a_version_that_suits_all_that_are_known_to_need_it(self, tmp_path: Path) -> None:
        index = Index({"a": [], "b": []})
        wheels.pack(
            [Requirement("b>=1"), Requirement("a"), Requirement("b<3")], tmp_path, index.fetch, there=()
        )
        assert index.asked[0].specifier == Requirement("b>=1,<3").specifier

    def test_refuses_two_versions_of_a_package(self, tmp_path: Path) -> None:
        index = Index({"a": ["b<2"], "b": []})
        with pytest.raises(
            wheels.CannotPack, match=r"b-2-py3-none-any.whl is packed, and b<2 is needed, too"
        ):
            wheels.pack([Requirement("b"), Requirement("a")], tmp_path, index.fetch, there=())

    def test_refuses_what_is_too_large_to_travel(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(wheels, "MOST_BYTES", 100)
        with pytest.raises(wheels.CannotPack, match=r"0 may travel: a 0\.0"):
            wheels.pack([Requirement("a")], tmp_path, Index({"a": []}).fetch, there=())

    def test_leaves_no_wheel_of_an_earlier_time(self, tmp_path: Path) -> None:
        (tmp_path / "old-1-py3-none-any.whl").touch()
        wheels.pack([Requirement("a")], tmp_path, Index({"a": []}).fetch, there=())
        assert [wheel.name for wheel in tmp_path.iterdir()] == ["a-1-py3-none-any.whl"]

    def test_needs_both_libraries_and_what_gallama_itself_needs(self) -> None:
        names = {requirement.name for requirement in wheels.roots(ROOT / "pyproject.toml")}
        assert {"exllamav2", "exllamav3", "llguidance", "fastapi", "pytest-asyncio"} <= names

    def test_tells_what_a_machine_lacks_of_what_should_be_there(self) -> None:
        assert wheels.missing({"torch", "nvidia-ml-py"}, ["Torch", "numpy"]) == ["nvidia-ml-py"]


@dataclass
class Index:
    """A registry whose packages have one version each: "b" 2, others 1."""

    needs: dict[str, list[str]]

    def __post_init__(self) -> None:
        self.asked: list[Requirement] = []

    def fetch(self, requirement: Requirement, folder: Path) -> Path:
        self.asked.append(requirement)
        name, number = requirement.name, 2 if requirement.name == "b" else 1
        wheel = folder / f"{name}-{number}-py3-none-any.whl"
        lines = [f"Name: {name}", *(f"Requires-Dist: {need}" for need in self.needs[name])]
        with ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}-{number}.dist-info/METADATA", "\n".join(lines))
        return wheel


class TestExtensions:
    LIBRARY = extension.LIBRARIES["v3"]

    def test_come_back_in_parts_and_are_whole_again(self, tmp_path: Path) -> None:
        file = tmp_path / "built.so"
        file.write_bytes(bytes(range(256)) * 40)
        written = extension.split_in_parts(
            file, tmp_path, "exllamav3_ext-torch2.11-cp312-sm90", part_bytes=150
        )
        assert len(written) > 1
        found = extension.parts(tmp_path, self.LIBRARY, "torch2.11-cp312-sm90")
        assert extension.join_parts(found, tmp_path / "site" / "again.so")
        assert (tmp_path / "site" / "again.so").read_bytes() == file.read_bytes()

    def test_of_another_torch_are_not_used(self, tmp_path: Path) -> None:
        (tmp_path / "exllamav3_ext-torch2.12-cp312-sm90.xz.0").touch()
        found = extension.parts(tmp_path, self.LIBRARY, "torch2.11-cp312-sm90")
        assert not extension.join_parts(found, tmp_path / "again.so")
        assert not (tmp_path / "again.so").exists()

    def test_that_are_too_large_stay_where_they_are(self, tmp_path: Path) -> None:
        file = tmp_path / "built.so"
        file.write_bytes(bytes(range(256)) * 40)
        assert extension.split_in_parts(file, tmp_path / "parts", "name", part_bytes=10) == []

    def test_that_cannot_be_loaded_here_are_compiled_as_if_there_were_none(self, tmp_path: Path) -> None:
        pytest.importorskip("torch")
        good, bad = tmp_path / "good.py", tmp_path / "bad.py"
        for file, text in ((good, "loads = True"), (bad, "raise ImportError('no such symbol')")):
            file.write_text(text)
            written = extension.split_in_parts(file, tmp_path, file.stem)
            file.unlink()
            assert extension.restore(written, file) == file.exists() == (file == good)

    def test_that_do_not_compile_leave_all_that_the_compiler_said(
        self,
        tmp_path: Path,
        findings: Findings,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Files that are compiled beside the one that broke print their long commands after its errors."""
        said = "a.cu(3): error: no such thing\n" + "[2/9] nvcc with all of its flags\n" * 5000

        def break_on_compiling(library: extension.Library) -> None:
            raise MissingExtra("it cannot be compiled") from RuntimeError(said)

        monkeypatch.setattr(places, "SITE", tmp_path)
        monkeypatch.setattr(places, "BACK", tmp_path)
        monkeypatch.setattr(extension, "built_for", lambda: "here")
        monkeypatch.setattr(extension, "import_library", break_on_compiling)
        with pytest.raises(MissingExtra):
            extension.build(findings, "v3")
        log = tmp_path / "v3.build.log"
        log.write_text(capfd.readouterr().out)
        assert tail(log).startswith("a.cu(3): error: no such thing\n")

    def test_are_compiled_ahead_though_the_library_breaks_without_a_gpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("torch")
        write_files(tmp_path, "toy/__init__.py", "extensions/toy_ext/lock")
        (tmp_path / "toy" / "ext.py").write_text(TOY_LIBRARY)
        monkeypatch.setattr(extension, "LIBRARIES", {"toy": extension.Library("toy")})
        monkeypatch.setattr(places, "EXTENSIONS", tmp_path / "extensions")
        monkeypatch.setattr(places, "BACK", tmp_path / "back")
        variables = {"PYTHONPATH": str(tmp_path), "FOLDER": str(tmp_path / "extensions" / "toy_ext")}
        (part,) = extension.compile_ahead("toy", (9, 0), variables)
        assert part.parent == tmp_path / "back"
        assert part.name.endswith("-sm90.xz.0")
        assert lzma.decompress(part.read_bytes()) == b"for 9.0"
        with pytest.raises(
            extension.CannotCompile, match=r"^toy has not been compiled: it ended with code 1"
        ):
            extension.compile_ahead("toy", (9, 0), variables | {"FOLDER": str(tmp_path / "nowhere")})

    def test_that_are_being_compiled_are_counted(self, tmp_path: Path, findings: Findings) -> None:
        (tmp_path / "build.ninja").write_text(
            "rule compile\n\nbuild a.o: compile a.cpp\nbuild b.cuda.o: c b.cu\n"
        )
        (tmp_path / "a.o").touch()
        with extension.telling(findings, tmp_path, every_seconds=0.001):
            deadline = time.monotonic() + 10
            while "compiled" not in found(findings) and time.monotonic() < deadline:
                time.sleep(0.01)
        assert found(findings)["compiled"] == "1 of 2 files"


class TestModels:
    def test_are_made_once_and_are_loaded_in_half_precision(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        shape = {"hidden_size": 128, "never_ends": True}
        folder = models.make_model(tmp_path / "model", tmp_path / "no tokenizer", shape)
        config = json.loads((folder / "config.json").read_text())
        made = (folder / "model.safetensors").stat().st_mtime_ns
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert config["rope_theta"] == 10_000
        assert None not in config.values()
        assert model.dtype == torch.float16
        assert not model.lm_head.weight[config["eos_token_id"]].any()
        assert models.make_model(folder, tmp_path, shape) == folder
        assert (folder / "model.safetensors").stat().st_mtime_ns == made


class TestRunner:
    @pytest.fixture
    def program(self, tmp_path: Path) -> list[str]:
        file = tmp_path / "stage.py"
        file.write_text(STAGE)
        return [sys.executable, str(file)]

    @pytest.fixture
    def new_runner(self, tmp_path: Path, program: list[str]) -> Callable[..., Runner]:
        return partial(Runner, tmp_path / "results", environment={}, command=program)

    def test_keeps_what_a_stage_found(self, new_runner: Callable[..., Runner]) -> None:
        runner = new_runner(seconds=60)
        runner.run([Stage("good", 30)], again=False)
        result = runner.results["good"]
        assert result["status"] == "held"
        assert result["checks"] == {"it works": {"held": True, "figure": 3}}
        assert {"seconds", "date"} <= result.keys()

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("bad", "it works did not hold"),
            ("broken", "it ended with code 3"),
            ("empty", "it checked nothing"),
        ],
    )
    def test_says_why_a_stage_failed(self, new_runner: Callable[..., Runner], name: str, why: str) -> None:
        runner = new_runner(seconds=60)
        runner.run([Stage(name, 30)], again=False)
        assert (runner.results[name]["status"], runner.results[name]["why"]) == ("failed", why)

    def test_tells_the_lines_of_the_log_that_look_like_errors(
        self, new_runner: Callable[..., Runner]
    ) -> None:
        runner = new_runner(seconds=60)
        runner.run([Stage("broken", 30)], again=False)
        assert runner.results["broken"]["log"].startswith("fatal error: no such header\n")

    def test_stops_a_stage_that_takes_too_long_with_all_that_it_started(
        self, new_runner: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("benchmarks.gpu_check.runner.LEAST_SECONDS", 0)
        runner = new_runner(seconds=60)
        runner.run([Stage("slow", 2)], again=False)
        assert runner.results["slow"]["why"] == "it was stopped after 2 s"
        assert runner.results["slow"]["checks"]["it works"]["held"]
        assert _commands_with(SLEEP) == []

    def test_a_stage_under_way_and_all_before_it_are_kept_when_the_check_is_ended(
        self, tmp_path: Path, program: list[str]
    ) -> None:
        """By the machine, at any moment: what is to be brought back lies there before a stage is begun."""
        kept: list[dict[str, Any]] = []
        runner = Runner(
            tmp_path,
            seconds=60,
            environment={},
            keep=lambda results: kept.append({name: each["status"] for name, each in results.items()}),
            command=program,
        )
        runner.run([Stage("good", 30), Stage("bad", 30)], again=False)
        assert kept[2] == {"good": "held", "bad": "failed"}
        assert json.loads((tmp_path / "results.json").read_text()).keys() == {"good", "bad"}
        assert len(kept) == 4

    def test_runs_no_stage_whose_ground_does_not_hold(self, new_runner: Callable[..., Runner]) -> None:
        runner = new_runner(seconds=60)
        runner.run([Stage("bad", 30), Stage("good", 30, needs=("bad",))], again=False)
        assert runner.results["good"] == {"status": "not run", "why": "bad must hold first"}

    def test_begins_no_stage_without_time(self, new_runner: Callable[..., Runner]) -> None:
        runner = new_runner(seconds=1)
        runner.run([Stage("good", 30)], again=False)
        assert runner.results["good"]["status"] == "not run"
        assert "no time was left" in runner.results["good"]["why"]

    def test_goes_on_in_the_next_command_where_it_was(self, new_runner: Callable[..., Runner]) -> None:
        new_runner(seconds=60).run([Stage("good", 30)], again=False)
        runner = new_runner(seconds=1)
        runner.run([Stage("good", 30), Stage("bad", 30)], again=False)
        assert {name: result["status"] for name, result in runner.results.items()} == {
            "good": "held",
            "bad": "not run",
        }

    def test_what_a_failed_stage_found_outlives_a_command_without_time_for_it(
        self, new_runner: Callable[..., Runner]
    ) -> None:
        new_runner(seconds=60).run([Stage("bad", 30)], again=False)
        runner = new_runner(seconds=1)
        runner.run([Stage("bad", 30)], again=False)
        assert runner.results["bad"]["why"] == "it works did not hold"

    def test_runs_what_held_again_when_asked(self, new_runner: Callable[..., Runner]) -> None:
        new_runner(seconds=60).run([Stage("good", 30)], again=False)
        runner = new_runner(seconds=1)
        runner.run([Stage("good", 30)], again=True)
        assert runner.results["good"]["status"] == "not run"


def _commands_with(text: str) -> list[str]:
    """Of all processes that are alive."""
    listing = subprocess.run(["ps", "-axwwo", "stat=,args="], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if line.endswith(text) and not line.startswith("Z")]


class TestSummary:
    EVERY = (Stage("one", 1), Stage("two", 1))

    def test_holds_only_if_every_stage_does(self) -> None:
        assert not sum_up({"one": {"status": "held"}}, self.EVERY, {})["held"]
        assert sum_up({"one": {"status": "held"}, "two": {"status": "held"}}, self.EVERY, {})["held"]

    def test_leaves_no_stage_out(self) -> None:
        told = sum_up({}, self.EVERY, {})["stages"]
        assert told["two"] == {"status": "not run", "why": "it was not asked for"}

    def test_the_exit_code_speaks_of_what_was_asked_for(self) -> None:
        summary = sum_up({"one": {"status": "held"}, "two": {"status": "failed"}}, self.EVERY, {})
        assert exit_code(summary, self.EVERY[:1]) == 0
        assert exit_code(summary, self.EVERY) == 1

    def test_that_comes_back_counts_on_the_next_machine_but_for_what_stayed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(places, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(places, "BUILT", tmp_path / "built")
        results = {"v3.build": {"status": "held"}, "v3.speed": {"status": "held"}}
        bring_back({"stages": results}, tmp_path)
        take_back(tmp_path, tmp_path / "results")
        assert json.loads((tmp_path / "results" / "results.json").read_text()) == {
            "v3.speed": {"status": "held"}
        }


class TestVersions:
    def test_of_what_is_not_there_are_told_as_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert nvcc() is None

    def test_of_the_compiler_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "nvcc"
        program.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
        assert nvcc() == "13.0.88"


class TestToolkit:
    """Headers and libraries that lie in several places, as on machines whose toolkit came in packages."""

    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        """A toolkit with a compiler and its runtime's header, and nothing else."""
        home = tmp_path / "cuda-13.0"
        write_files(home, "include/cuda_runtime.h")
        write_program(home / "bin" / "nvcc", f"echo '#$ _HERE_={home}/bin\n#$ TOP={home}/bin/..' >&2")
        return home

    def test_is_found_behind_a_script_on_the_path(self, home: Path, tmp_path: Path) -> None:
        write_program(tmp_path / "local" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
        nvcc = toolkit.find_nvcc({"PATH": f"{tmp_path}/local/bin:/bin"})
        assert nvcc == tmp_path / "local" / "bin" / "nvcc"
        assert toolkit.find_toolkit(nvcc) == home

    def test_is_the_one_that_the_user_names(self, home: Path, tmp_path: Path) -> None:
        chosen = toolkit.settings({"CUDA_HOME": str(home), "PATH": "/bin"}, tmp_path / "links")
        assert chosen["CUDA_HOME"] == str(home)

    def test_is_asked_for_no_header_that_it_has(self, home: Path, tmp_path: Path) -> None:
        write_files(tmp_path / "cu13", "include/cuda_runtime.h", "include/cublas_v2.h", "include/cusparse.h")
        found = toolkit.folders_with(
            ["cuda_runtime.h", "cublas_v2.h", "cusparse.h"], home, [tmp_path / "cu13"]
        )
        assert found == [tmp_path / "cu13" / "include"]
        assert toolkit.folders_with(["cuda_runtime.h"], home, [tmp_path / "cu13"]) == []

    def test_runtime_of_a_package_gets_the_name_that_a_linker_looks_for(
        self, home: Path, tmp_path: Path
    ) -> None:
        write_files(tmp_path / "cu13", "lib/libcudart.so.13")
        links = toolkit.link_runtime(home, [tmp_path / "cu13"], tmp_path / "links")
        assert links is not None
        assert (links / "libcudart.so").resolve() == tmp_path / "cu13" / "lib" / "libcudart.so.13"
        write_files(home, "lib64/libcudart.so")
        assert toolkit.link_runtime(home, [tmp_path / "cu13"], tmp_path / "links") is None


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_program(file: Path, line: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)


class TestCommandLine:
    def test_runs_all_stages_where_none_is_named(self) -> None:
        assert select([], stages()) == stages()

    def test_an_engine_stands_for_its_stages_and_what_they_need(self) -> None:
        names = [stage.name for stage in select(["v2"], stages())]
        assert names == ["models", "v2.build", "v2.conformance", "v2.checks", "v2.speed"]

    def test_a_stage_comes_with_what_it_needs(self) -> None:
        assert [stage.name for stage in select(["v3.conformance"], stages())] == [
            "v3.build",
            "v3.conformance",
        ]

    def test_a_stage_that_is_not_there_is_refused_with_those_that_are(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["run", "v4"])
        assert ended.value.code == 2
        assert "no such stage: v4; there are models, v3.build" in capsys.readouterr().err

    def test_every_stage_and_key_stands_in_the_documentation(self) -> None:
        text = (ROOT / "docs" / "gpu_check.md").read_text()
        words = set(re.findall(r"`([\w.]+)`", text))
        assert {stage.name for stage in stages()} <= words
        assert sum_up({}, stages(), {}).keys() <= words
        (row, *_) = to_rows(
            Load(1, 1, 1), {kind: [Turn(1, 1, 1)] for kind in (*KINDS, "library")}, draft=False
        )
        assert row.keys() <= words

    def test_the_script_says_what_to_do_first(self, tmp_path: Path) -> None:
        (tmp_path / "scripts").mkdir()
        script = tmp_path / "scripts" / "gpu_check"
        script.write_bytes((ROOT / "scripts" / "gpu_check").read_bytes())
        done = subprocess.run(["bash", str(script), "run"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "run scripts/gpu_check pack first" in done.stderr


KINDS = (speed.FREE, speed.CONSTRAINED)


TURNS = {
    "free": [Turn(2, 200, 100), Turn(1, 200, 100), Turn(1, 200, 100)],
    "constrained": [Turn(1, 100, 100)] * 3,
    "library": [Turn(1, 200, 100), Turn(0.9, 200, 100), Turn(0.8, 200, 100)],
}


class TestSpeed:
    def test_a_ratio_is_the_median_of_the_rounds(self) -> None:
        free, constrained = to_rows(Load(2, 100, 1), TURNS, draft=False)
        assert (free["ratio"], constrained["ratio"]) == (0.8, 0.45)
        assert (free["tok_s"], free["library_tok_s"]) == (200, 222.2)

    def test_the_overhead_is_what_a_step_takes_longer(self) -> None:
        free, _ = to_rows(Load(2, 100, 1), TURNS, draft=False)
        assert free["overhead_ms"] == 2

    def test_a_grammar_under_which_drafts_are_wrong_has_no_target(self) -> None:
        free, constrained = to_rows(Load(2, 100, 0), TURNS, draft=True)
        assert not speed.is_met(free)
        assert "target" not in constrained
        assert speed.is_met(constrained)

    def test_a_load_without_time_is_told_of(self, findings: Findings) -> None:
        never: Any = None
        measure(findings, never, never, [Load(8, 1, 1)], draft=True, rounds=1, deadline=time.monotonic() - 1)
        check = found(findings)["checks"]["8 at once with a draft model"]
        assert not check["held"]
        assert "no time was left" in check["why"]


class TestReports:
    def test_what_did_not_pass_is_told_by_name(self, tmp_path: Path) -> None:
        report = tmp_path / "report.xml"
        report.write_text(
            '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="good"/>'
            '<testcase name="bad"><failure message="no"/></testcase>'
            '<testcase name="left out"><skipped message="why"/></testcase></testsuite></testsuites>'
        )
        counts, names = read_report(report)
        assert counts == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}
        assert names == ["bad: no", "left out: why"]


class TestAnswers:
    @pytest.mark.parametrize(
        ("answer", "problem"),
        [
            (Written("{", 1, 0, "stop"), "Expecting property name"),
            (Written("{}", 1, 0, "stop"), "does not follow the grammar: '{}'"),
            (Written("{}", 9, 0, "length"), "ended by length after 9 tokens: '{}'"),
            (RuntimeError("gone"), "RuntimeError: gone"),
        ],
    )
    def test_that_are_wrong_are_told_of(self, answer: Written | BaseException, problem: str) -> None:
        assert problem in (problem_with(works()[0], answer) or "")

    def test_that_are_right_are_no_problem(self) -> None:
        person = {"name": "A", "age": 3, "occupation": "baker", "is_employed": True, "tags": []}
        assert problem_with(works()[0], Written(json.dumps(person), 9, 0, "stop")) is None


def test_a_call_breaks_once() -> None:
    class Library:
        def forward(self) -> str:
            return "whole"

    break_next_call(Library, "forward")
    with pytest.raises(RuntimeError, match="the check breaks this step"):
        Library().forward()
    assert Library().forward() == "whole"


@dataclass(frozen=True)
class Ground:
    engine: str
    folder: Path
    slots: int


@contextmanager
def _ground_of_v2(folder: Path, *, has_flash_attention: bool) -> Iterator[Ground]:
    from tests.engines.exllamav2.ground import laid_ground, save_folder

    with laid_ground(has_flash_attention=has_flash_attention):
        sys.modules["exllamav2_ext"].sample_basic = _take_the_likeliest  # type: ignore[attr-defined]
        yield Ground("v2", save_folder(folder), slots=3 if has_flash_attention else 1)


@contextmanager
def _ground_of_v3(folder: Path) -> Iterator[Ground]:
    from tests.engines.exllamav3.ground import save_model, without_gpu

    with without_gpu():
        yield Ground("v3", save_model(folder), slots=3)


def _take_the_likeliest(logits: Any, *arguments: Any) -> list[float]:
    """What the extension of exllamav2 does for its own sampler, where that is greedy."""
    output_token_ids = arguments[8]
    output_token_ids[0, 0] = int(logits[0, 0].argmax())
    return []


GROUNDS: dict[str, Callable[[Path], AbstractContextManager[Ground]]] = {
    "v2": partial(_ground_of_v2, has_flash_attention=True),
    "v2 without flash-attn": partial(_ground_of_v2, has_flash_attention=False),
    "v3": _ground_of_v3,
}


@pytest.fixture(scope="module", params=list(GROUNDS))
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    pytest.importorskip("torch")
    with GROUNDS[request.param](tmp_path_factory.mktemp("model")) as ground:
        yield ground


@pytest.fixture
def engine(ground: Ground) -> Iterator[Engine]:
    engine = load_engine(ground.engine, ground.folder, cache_size=4096)
    yield engine
    asyncio.run(engine.close())


class TestOverTheLibrariesOwnGenerators:
    """Where a model of arithmetic stands for the GPU; see tests/engines/exllamav2 and exllamav3."""

    async def test_a_constrained_load_is_answered_right(self, engine: Engine, findings: Findings) -> None:
        await check_load(findings, engine, count=9)
        check = found(findings)["checks"]["all constrained answers follow their grammars"]
        assert (check["held"], check["requests"]) == (True, 9)
        assert check["sampled_tokens"] > 0

    async def test_cancelling_frees_slots_and_pages(
        self, ground: Ground, engine: Engine, findings: Findings
    ) -> None:
        await check_cancelling(findings, engine, slots=ground.slots)
        checks = found(findings)["checks"]
        assert checks["a cancelled answer frees its slot within three steps"]["steps"] >= 0
        assert checks["all pages are free afterwards"]["held"]

    async def test_answers_outlive_a_broken_step(
        self, ground: Ground, engine: Engine, findings: Findings, caplog: pytest.LogCaptureFixture
    ) -> None:
        await check_broken_step(findings, engine, partial(break_a_step, ground.engine), slots=ground.slots)
        assert [check["held"] for check in found(findings)["checks"].values()] == [True, True]
        assert any("broke" in record.message for record in caplog.records)

    @pytest.mark.parametrize("draft", [False, True])
    def test_the_library_s_own_loop_is_measured_beside_ours(
        self, ground: Ground, findings: Findings, draft: bool
    ) -> None:
        drafting = {"draft_model_id": str(ground.folder), "num_draft_tokens": 4} if draft else {}
        engine = load_engine(ground.engine, ground.folder, cache_size=4096, **drafting)
        library = LOOPS[ground.engine](ground.folder, draft=draft, slots=4, cache_tokens=4096)
        try:
            later = time.monotonic() + 60
            measure(findings, Ours(engine), library, [Load(2, 8, 0)], draft=draft, rounds=1, deadline=later)
        finally:
            library.close()
            asyncio.run(engine.close())
        free, constrained = found(findings)["table"]
        assert (free["kind"], constrained["kind"]) == KINDS
        assert constrained["tokens"] == 16
        assert 0 < free["tokens"] <= 16
        assert all(row["ratio"] > 0 for row in (free, constrained))
