"""The Dockerfile says what it must, as far as that shows without a Docker daemon.

Covers: the instructions, and the real commands among them that need no network. Does not cover: an
image built and run.
"""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from torch.distributed.run import parse_args

from launch.config import parse_config
from storage.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TEXT = (ROOT / "Dockerfile").read_text()

SECRET_NAME = re.compile(r"(?i)secret|password|passwd|api_?key|access_?key|credential|token$")
SECRET_VALUE = re.compile(
    r"-----BEGIN|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|ya29\.|gh[pousr]_\w{36}|hf_\w{30}|://[^/\s]+:[^/\s]+@"
)

Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """(NAME, the rest) of each instruction, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, _, rest in found]


def all_of(name: str, text: str = TEXT) -> list[str]:
    """The rest of every instruction of that name."""
    return [rest for found, rest in instructions(text) if found == name]


def values(name: str, text: str = TEXT) -> dict[str, str]:
    """Names and values of every ARG, ENV or LABEL."""
    words = [word for rest in all_of(name, text) for word in shlex.split(rest)]
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def copied() -> list[str]:
    """The sources of every COPY."""
    return [source for rest in all_of("COPY") for source in rest.split()[:-1]]


def secrets(text: str) -> list[str]:
    """What looks like a secret: the name of an ARG or ENV, or any value."""
    names = [*values("ARG", text), *values("ENV", text)]
    return [n for n in names if SECRET_NAME.search(n)] + SECRET_VALUE.findall(text)


def image_tree(folder: Path) -> Path:
    """The image's /app: what COPY puts there."""
    app = folder / "app"
    app.mkdir()
    for rest in all_of("COPY"):
        source, target = rest.split()
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, app / target, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / source, app / target)
    return app


def test_the_base_image_has_a_tag() -> None:
    (base,) = all_of("FROM")
    assert base == "${BASE}"
    name, _, tag = values("ARG")["BASE"].rpartition(":")
    assert name == "python"
    assert tag.startswith("3.11-slim-")


def test_it_runs_as_a_numeric_user_who_is_not_root() -> None:
    (user,) = all_of("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    names = [name for name, _ in instructions(TEXT)]
    assert set(names[names.index("USER") :]) == {"USER", "CMD"}
    assert f"--uid {user.partition(':')[0]} " in TEXT


def test_the_supervisor_is_process_1_and_trains_into_the_volume() -> None:
    assert all_of("ENTRYPOINT") == [], "another command is process 1 itself"
    (command,) = all_of("CMD")
    python, module, name, dashes, *arguments = json.loads(command)
    assert (python, module, name, dashes) == ("python", "-m", "launch.supervise", "--")
    torchrun = parse_args(arguments)
    assert torchrun.standalone
    assert torchrun.training_script == "launch/train.py"
    assert parse_config(torchrun.training_script_args).run == "runs/default"


def test_a_command_with_an_unknown_flag_is_refused() -> None:
    torchrun = parse_args(["--standalone", "--", "launch/train.py", "--no_such_flag", "1"])
    with pytest.raises(ConfigurationError, match="Unrecognized options: --no_such_flag, 1"):
        parse_config(torchrun.training_script_args)


def test_what_is_copied_exists_and_is_every_package() -> None:
    assert all((ROOT / source).exists() for source in copied())
    packages = [p for p in PROJECT["tool"]["setuptools"]["packages"] if "." not in p]
    assert sorted(copied()) == sorted(["pyproject.toml", *(f"{p}/" for p in packages)])


def test_nothing_else_reaches_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[0] == "*"
    assert sorted(allowed) == sorted(source.rstrip("/") for source in copied())
    assert [rule for rule in rules[1:] if not rule.startswith("!")] == ["**/__pycache__"]


def test_nothing_is_added_from_a_url() -> None:
    assert all_of("ADD") == []
    assert not re.search(r"\b(curl|wget)\b", TEXT)
    assert not any("://" in source for source in copied())


def test_there_are_no_secrets() -> None:
    assert secrets(TEXT) == []


@pytest.mark.parametrize(
    "line",
    ["ENV HF_TOKEN=x", "ARG AWS_SECRET_ACCESS_KEY", "RUN echo AKIA" + "A" * 16, "ENV API_KEY=x"],
)
def test_a_secret_would_be_seen(line: str) -> None:
    assert secrets(f"{TEXT}\n{line}\n")


def test_a_change_of_code_installs_nothing_again() -> None:
    steps = [(name, rest) for name, rest in instructions(TEXT) if name in ("RUN", "COPY")]
    torch = next(i for i, (_, rest) in enumerate(steps) if '"${TORCH_INDEX}"' in rest)
    first_copy = next(i for i, (name, _) in enumerate(steps) if name == "COPY")
    first_code = next(i for i, (name, rest) in enumerate(steps) if rest.startswith("storage/"))
    assert torch < first_copy < first_code
    assert steps[first_copy][1].startswith("pyproject.toml ")
    assert all(name == "COPY" for name, _ in steps[first_code:])


def test_torch_is_the_one_of_the_makefile() -> None:
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    assert values("ARG")["TORCH"] == torch[1]


def test_what_is_installed_is_what_the_project_declares(tmp_path: Path) -> None:
    """The real command, with a pip that writes down what it is asked."""
    (step,) = [run for run in all_of("RUN") if "requirements.txt" in run]
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text('#!/bin/sh\necho "$@" > asked\n')
    pip.chmod(pip.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TORCH": "torch==2.13.0"}
    subprocess.run(["/bin/sh", "-c", step], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "asked").read_text() == (
        "install torch==2.13.0 --requirement requirements.txt\n"
    )
    listed = (tmp_path / "requirements.txt").read_text().splitlines()
    project = PROJECT["project"]
    assert listed == [*project["dependencies"], *project["optional-dependencies"]["health"]]


def test_caches_and_home_are_below_tmp() -> None:
    environment = values("ENV")
    assert environment["HOME"] == "/tmp"
    caches = {name: value for name, value in environment.items() if "CACHE_" in name}
    del caches["PIP_NO_CACHE_DIR"]
    assert len(caches) >= 3
    assert all(PurePosixPath(value).is_relative_to("/tmp") for value in caches.values())


def test_the_labels_are_those_of_the_project() -> None:
    labels = values("LABEL")
    assert labels["org.opencontainers.image.version"] == PROJECT["project"]["version"]
    assert labels["org.opencontainers.image.description"] == PROJECT["project"]["description"]


def test_what_is_copied_is_enough_to_start_without_a_home(tmp_path: Path) -> None:
    app = image_tree(tmp_path)
    answer = subprocess.run(
        [sys.executable, "launch/train.py", "--help"],
        cwd=app,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "--save_interval_steps" in answer.stdout
