"""The commands in scripts/ and .ci/: what they set up, run and leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"])
NO_AMX = ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]

# Makes a virtual environment of itself, and notes what it is to install, and with which options. What it
# installs as `gallama` notes which environment it is to build, and where. Into other folders it unpacks.
PYTHON = """\
#!/bin/sh
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip --version") ;;
    *" --target "*)
        while [ "$1" != --target ]; do shift; done
        echo "$3" >> unpacked
        if [ -f no-network ]; then exit 1; fi
        mkdir -p "$2/${3%==*}-${3##*==}.dist-info" ;;
    "-m pip install"*)
        echo "$* CMAKE_ARGS=${CMAKE_ARGS:-}" >> installed
        if [ -f no-network ]; then exit 1; fi
        printf '#!/bin/sh\\n%s\\n' "$GALLAMA" > .venv/bin/gallama && chmod +x .venv/bin/gallama ;;
esac
"""
GALLAMA = """\
if [ "$1" = setup ]; then
    echo "$* GALLAMA_HOME=$GALLAMA_HOME PIP_CONSTRAINT=$PIP_CONSTRAINT" >> environments
    if [ -f no-environment ]; then exit 2; fi
    mkdir -p .gallama-test/environments/embedding/bin
    printf '' > .gallama-test/environments/embedding/bin/python
fi
"""
# A shell without job control lets what it starts in the background ignore Ctrl-C; in a terminal nothing does.
HEED_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
OLD_PYTHON = "#!/bin/sh\nexit 1\n"
COMPILER = "#!/bin/sh\nexit 0\n"
OLD_COMPILER = '#!/bin/sh\ncase "$*" in *-mno-amx*) exit 1 ;; esac\n'


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
class TestEveryScript:
    def test_is_executable(self, script: Path) -> None:
        assert os.access(script, os.X_OK)

    def test_is_a_script_of_bash(self, script: Path) -> None:
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")

    def test_stops_at_the_first_error(self, script: Path) -> None:
        assert "\nset -euo pipefail\n" in script.read_text()


def test_the_ci_checks_and_tests_and_does_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["scripts/check", "scripts/test"]


@dataclass(frozen=True)
class Copy:
    """A fresh copy of what scripts/setup reads, on a machine made up of small programs."""

    folder: Path

    def put_program(self, name: str, text: str) -> None:
        program = self.folder / "programs" / name
        program.write_text(text)
        program.chmod(0o755)

    def setup(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'programs'}{os.pathsep}{os.environ['PATH']}"
        ours = {
            name: value
            for name, value in os.environ.items()
            if name not in ("CC", "CMAKE_ARGS", "PIP_CONSTRAINT", "PYTHON")
        }
        return subprocess.run(
            [str(self.folder / "scripts" / "setup"), *arguments],
            env=ours | {"PATH": path, "GALLAMA": GALLAMA} | variables,
            capture_output=True,
            text=True,
        )

    def installed(self) -> list[str]:
        """A line for each installation: pip's arguments and the options of the build."""
        log = self.folder / "installed"
        return log.read_text().splitlines() if log.exists() else []

    def environments(self) -> list[str]:
        """A line for each time that an environment was to be built: its name, and two variables."""
        log = self.folder / "environments"
        return log.read_text().splitlines() if log.exists() else []

    def unpacked(self) -> list[str]:
        """Each package that was to be unpacked, with its version."""
        log = self.folder / "unpacked"
        return log.read_text().splitlines() if log.exists() else []

    def cmake_args(self) -> str:
        (line,) = self.installed()
        return line.split(" CMAKE_ARGS=")[1]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "constraints.txt", tmp_path / "tests")
    (tmp_path / "programs").mkdir()
    copy = Copy(tmp_path)
    copy.put_program("python3", PYTHON)
    copy.put_program("cc", COMPILER)
    copy.put_program("uname", "#!/bin/sh\necho x86_64\n")
    return copy


class TestSetup:
    def test_makes_an_environment_and_installs_the_demo(self, copy: Copy) -> None:
        done = copy.setup()
        assert done.returncode == 0, done.stderr
        assert (copy.folder / ".venv" / "bin" / "python").exists()
        assert [line.split(" CMAKE_ARGS=")[0].split()[-2:] for line in copy.installed()] == [
            ["--editable", ".[demo]"]
        ]

    def test_installs_the_extra_that_is_named(self, copy: Copy) -> None:
        copy.setup("dev")
        assert ".[dev]" in copy.installed()[0]

    def test_does_nothing_the_second_time(self, copy: Copy) -> None:
        copy.setup()
        done = copy.setup()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert len(copy.installed()) == 1

    def test_installs_again_when_the_requirements_change(self, copy: Copy) -> None:
        copy.setup()
        with (copy.folder / "pyproject.toml").open("a") as file:
            file.write("# changed\n")
        copy.setup()
        assert len(copy.installed()) == 2

    def test_needs_nothing_more_for_the_demo_where_development_is_set_up(self, copy: Copy) -> None:
        copy.setup("dev")
        copy.setup("demo")
        assert len(copy.installed()) == 1

    def test_needs_more_for_development_where_the_demo_is_set_up(self, copy: Copy) -> None:
        copy.setup("demo")
        copy.setup("dev")
        assert len(copy.installed()) == 2

    def test_an_installation_that_failed_is_tried_again(self, copy: Copy) -> None:
        (copy.folder / "no-network").touch()
        assert copy.setup().returncode == 1
        (copy.folder / "no-network").unlink()
        assert copy.setup().returncode == 0
        assert len(copy.installed()) == 2

    def test_an_environment_that_no_longer_works_is_installed_again(self, copy: Copy) -> None:
        copy.setup()
        (copy.folder / ".venv" / "bin" / "gallama").unlink()
        assert copy.setup().returncode == 0
        assert len(copy.installed()) == 2

    def test_a_python_that_does_not_fit_is_refused_by_name(self, copy: Copy) -> None:
        copy.put_program("python3.9", OLD_PYTHON)
        done = copy.setup(PYTHON="python3.9")
        assert done.returncode == 1
        assert done.stderr == (
            "gallama needs Python 3.11 or newer, which python3.9 is not;"
            " name one with PYTHON=/path/to/python3.\n"
        )
        assert not (copy.folder / ".venv").exists()

    def test_a_newer_python_is_found_beside_an_old_one(self, copy: Copy) -> None:
        copy.put_program("python3", OLD_PYTHON)
        copy.put_program("python3.14", PYTHON)
        assert copy.setup().returncode == 0


class TestTheEnvironmentThatEmbeds:
    def test_comes_with_the_tools_for_development(self, copy: Copy) -> None:
        copy.setup("dev")
        assert copy.environments() == [
            "setup embedding GALLAMA_HOME=.gallama-test PIP_CONSTRAINT= tests/constraints.txt"
        ]

    def test_keeps_to_the_users_constraints_too(self, copy: Copy) -> None:
        copy.setup("dev", PIP_CONSTRAINT="mine.txt")
        assert copy.environments()[0].endswith("PIP_CONSTRAINT=mine.txt tests/constraints.txt")

    def test_does_not_come_with_the_demo(self, copy: Copy) -> None:
        assert copy.setup("demo").returncode == 0
        assert copy.environments() == []

    def test_is_not_asked_for_twice(self, copy: Copy) -> None:
        copy.setup("dev")
        done = copy.setup("dev")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert len(copy.environments()) == 1

    def test_is_built_again_where_it_has_gone(self, copy: Copy) -> None:
        copy.setup("dev")
        shutil.rmtree(copy.folder / ".gallama-test")
        assert copy.setup("dev").returncode == 0
        assert len(copy.environments()) == 2

    def test_that_cannot_be_built_is_an_error_and_tried_again(self, copy: Copy) -> None:
        (copy.folder / "no-environment").touch()
        assert copy.setup("dev").returncode == 2
        (copy.folder / "no-environment").unlink()
        assert copy.setup("dev").returncode == 0


class TestTheSourcesOfExllama:
    def test_come_with_the_tools_for_development(self, copy: Copy) -> None:
        copy.setup("dev")
        assert [package.split("==")[0] for package in copy.unpacked()] == ["exllamav2", "exllamav3"]
        assert {path.name for path in (copy.folder / ".gallama-test" / "exllama").iterdir()} == {
            "exllamav2",
            "exllamav3",
        }

    def test_do_not_come_with_the_demo(self, copy: Copy) -> None:
        copy.setup("demo")
        assert copy.unpacked() == []

    def test_are_versions_that_the_extras_allow(self, copy: Copy) -> None:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        copy.setup("dev")
        for package in copy.unpacked():
            name, version = package.split("==")
            (allowed,) = (each for each in map(Requirement, extras[name]) if each.name == name)
            assert allowed.specifier.contains(version), package

    def test_are_unpacked_again_where_one_is_missing(self, copy: Copy) -> None:
        copy.setup("dev")
        shutil.rmtree(copy.folder / ".gallama-test" / "exllama" / "exllamav3")
        assert copy.setup("dev").returncode == 0
        assert len(copy.unpacked()) == 4


APT_GET = """\
#!/bin/sh
echo "$*" >> apt-get-calls
case "$*" in
    *install*) printf '#!/bin/sh\\n' > programs/chromium && chmod +x programs/chromium ;;
esac
"""
TOOLS = (
    *(
        "bash",
        "cat",
        "chmod",
        "cksum",
        "cp",
        "dirname",
        "getconf",
        "grep",
        "mkdir",
        "mv",
        "printf",
        "rm",
        "sh",
    ),
)


class TestChromium:
    """On machines that have none."""

    @pytest.fixture
    def bare(self, copy: Copy) -> Copy:
        for name in TOOLS:
            (copy.folder / "programs" / name).symlink_to(shutil.which(name) or pytest.fail(name))
        copy.put_program("id", "#!/bin/sh\necho 0\n")
        copy.put_program("apt-get", APT_GET)
        return copy

    def setup(self, copy: Copy, extra: str) -> subprocess.CompletedProcess[str]:
        return copy.setup(extra, PATH=str(copy.folder / "programs"))

    def asked_of_apt_get(self, copy: Copy) -> list[str]:
        log = copy.folder / "apt-get-calls"
        return log.read_text().splitlines() if log.exists() else []

    def test_comes_with_the_tools_for_development(self, bare: Copy) -> None:
        done = self.setup(bare, "dev")
        assert done.returncode == 0, done.stderr
        assert "Installing Chromium, for tests in a browser.\n" in done.stderr
        assert self.asked_of_apt_get(bare) == ["update", "install -y --no-install-recommends chromium"]

    def test_does_not_come_with_the_demo(self, bare: Copy) -> None:
        assert self.setup(bare, "demo").returncode == 0
        assert self.asked_of_apt_get(bare) == []

    def test_is_left_alone_where_there_is_one(self, bare: Copy) -> None:
        bare.put_program("chromium", "#!/bin/sh\n")
        assert "Chromium" not in self.setup(bare, "dev").stderr
        assert self.asked_of_apt_get(bare) == []

    def test_is_not_asked_for_by_who_may_not_install_it(self, bare: Copy) -> None:
        bare.put_program("id", "#!/bin/sh\necho 1000\n")
        done = self.setup(bare, "dev")
        assert done.returncode == 0
        assert "tests in a browser will be skipped" in done.stderr
        assert self.asked_of_apt_get(bare) == []

    def test_that_cannot_be_had_stops_nothing(self, bare: Copy) -> None:
        bare.put_program("apt-get", "#!/bin/sh\nexit 1\n")
        done = self.setup(bare, "dev")
        assert done.returncode == 0
        assert "could not be installed" in done.stderr
        assert self.setup(bare, "dev").stderr == ""


class TestCompilerFlags:
    def test_on_x86_llama_cpp_is_compiled_without_amx(self, copy: Copy) -> None:
        copy.setup()
        # Split as the build does it: as a shell would.
        options = dict(option.split("=", 1) for option in shlex.split(copy.cmake_args()))
        assert options == {"-DCMAKE_C_FLAGS": " ".join(NO_AMX), "-DCMAKE_CXX_FLAGS": " ".join(NO_AMX)}

    def test_the_options_that_a_user_sets_are_left_alone(self, copy: Copy) -> None:
        copy.setup(CMAKE_ARGS="-DGGML_CUDA=on")
        assert copy.cmake_args() == "-DGGML_CUDA=on"

    def test_other_processors_get_no_flags_of_x86(self, copy: Copy) -> None:
        copy.put_program("uname", "#!/bin/sh\necho aarch64\n")
        copy.setup()
        assert copy.cmake_args() == ""

    def test_a_compiler_that_does_not_know_amx_gets_no_flags_about_it(self, copy: Copy) -> None:
        copy.put_program("cc", OLD_COMPILER)
        copy.setup()
        assert copy.cmake_args() == ""


@dataclass(frozen=True)
class Terminal:
    """A process group in the foreground of a terminal, as far as it goes: Ctrl-C reaches all of it."""

    process: subprocess.Popen[bytes]
    output_file: Path

    def output(self) -> str:
        return self.output_file.read_text()

    def wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def descendants(self) -> dict[int, str]:
        """Every process that came of it, by id, with its command."""
        listing = subprocess.run(["ps", "-axwwo", "pid=,ppid=,args="], capture_output=True, text=True)
        rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
        found: dict[int, str] = {}
        parents = {self.process.pid}
        while parents:
            children = {int(row[0]): row[2] for row in rows if int(row[1]) in parents}
            found |= children
            parents = set(children)
        return found


@pytest.fixture
def run_script(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def run(name: str, **variables: str) -> Terminal:
        output_file = tmp_path / "output"
        with output_file.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", HEED_CTRL_C, str(ROOT / "scripts" / name)],
                cwd=ROOT,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started.append(Terminal(process, output_file))
        return started[-1]

    yield run
    for terminal in started:
        for process_id in [terminal.process.pid, *terminal.descendants()]:
            _kill(process_id)
        terminal.process.wait()


def _kill(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)


def _lives(process_id: int) -> bool:
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(process_id)], capture_output=True, text=True)
    return listing.stdout.strip()[:1] not in ("", "Z")


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.skipif(
    not (ROOT / ".venv").exists(), reason="scripts/test makes .venv, which this would install"
)
class TestRun:
    def test_shows_a_tool_call_and_serves_until_ctrl_c_and_leaves_nothing(
        self, run_script: Callable[..., Terminal], free_port: int
    ) -> None:
        terminal = run_script("run", PORT=str(free_port))
        terminal.wait_for("Ctrl-C ends it.", seconds=120)
        assert f"http://127.0.0.1:{free_port}/v1" in terminal.output()
        shown = dict(re.findall(r"^(\w+): +(.*)$", terminal.output(), re.MULTILINE))
        assert json.loads(shown["Arguments"]).keys() == {"restaurant", "guests", "time", "seats"}
        assert json.loads(shown["Guarantee"])["valid"]
        descendants = terminal.descendants()
        assert any("gallama.worker" in command for command in descendants.values()), descendants

        terminal.press_ctrl_c()

        terminal.process.wait(10)
        assert [command for process_id, command in descendants.items() if _lives(process_id)] == []
        assert "Traceback" not in terminal.output()

    def test_ends_with_the_reason_when_the_port_is_taken(self, run_script: Callable[..., Terminal]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            terminal = run_script("run", PORT=str(port))
            assert terminal.process.wait(60) != 0
        assert f"Cannot listen on 127.0.0.1 port {port}" in terminal.output()
        assert "The gateway has ended before it was ready" in terminal.output()
