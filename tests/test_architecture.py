"""The house as DESIGN draws it: who may import whom, and which file alone may name what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "storage": set(),
    "data_service": {"storage"},
    "checkpointing": {"storage"},
    "trainer": {"data_service", "checkpointing", "storage"},
    "launch": {"trainer", "data_service", "checkpointing", "storage"},
}
"""Package to the other packages that it may import."""

PINS: dict[str, set[str]] = {
    "torch.distributed": {
        *("trainer/reduction.py", "launch/world.py"),
        "launch/agent.py",  # it is torchrun
    },
    "bitsandbytes": {"trainer/optimizer.py"},
    "signal": {
        *("launch/notice.py", "launch/wake.py"),  # whoever hears signals
        *("launch/start.py", "launch/descendants.py", "launch/minded.py"),  # whoever sends them
        *("launch/chaos/watched.py", "launch/chaos/trial.py"),  # faults
        *("launch/chaos/one_host.py", "launch/chaos/soak.py", "launch/chaos/__main__.py"),
        "launch/outcome.py",  # which names them
        "launch/chaos/hosts.py",  # a host that loses power
    },
    "os.environ": {
        "launch/world.py",  # who we are
        *("launch/start.py", "launch/reporting.py"),  # the supervisor tells its ranks
        "launch/supervise.py",  # the entry, which passes on what it was started with
        *("launch/chaos/watched.py", "launch/chaos/trial.py"),  # a trial tells its processes
    },
    "os.getenv": set(),
    "os.putenv": set(),
    "tiktoken": {"data_service/tokenizer.py"},
    "fsspec": {"storage/clients.py", "storage/s3_client.py"},
    "gcsfs": {"storage/gcs_client.py"},
    "s3fs": {"storage/s3_client.py"},
    "aiohttp": {"storage/gcs_client.py"},
    "google_crc32c": {"storage/checksum.py"},
    "tenacity": {"storage/fsspec_store.py"},
    "prometheus_client": {"launch/health.py"},
    "tensorboard": {"trainer/metrics.py"},
    "torch.utils.tensorboard": {"trainer/metrics.py"},
    "torch.save": {"checkpointing/export.py"},
}
"""Dotted name to the files that alone may name it, or anything in it."""

EXECUTES_DATA = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("torch.load", "torch.package", "torch.jit.load", "eval", "exec"),
    *("torch.distributed.all_gather_object", "torch.distributed.gather_object"),
    *("torch.distributed.broadcast_object_list", "torch.distributed.scatter_object_list"),
}
"""What would run code that somebody put into a file or a message."""


@cache
def modules(root: Path) -> dict[str, ast.Module]:
    """Every module of the five packages, by its path below `root`."""
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text())
        for package in MAY_IMPORT
        for path in sorted((root / package).rglob("*.py"))
    }


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what is imported, anywhere in the module, also by `import_module("...")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from (str(name) for name in names)


@cache
def names(tree: ast.Module) -> set[str]:
    """Dotted names of all that the module names, with `import ... as` undone."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = set(imports(tree))
    for node in ast.walk(tree):
        first, *rest = _dotted(node).split(".")
        found.add(".".join([aliases.get(first, first), *rest]))
    return found - {""}


def forbidden_imports(root: Path) -> list[str]:
    """Imports that the table does not allow."""
    found = []
    for path, tree in modules(root).items():
        package = path.partition("/")[0]
        for name in imports(tree):
            target = name.partition(".")[0]
            if target in MAY_IMPORT and target not in {package, *MAY_IMPORT[package]}:
                found.append(f"{path} imports {name}")
            if not target:
                found.append(f"{path} imports {name}, which is relative")
    return found


def named_elsewhere(root: Path) -> list[str]:
    """Pinned names in files that may not name them."""
    return [
        f"{path} names {name}"
        for path, tree in modules(root).items()
        for name in sorted(names(tree))
        for pin, allowed in PINS.items()
        if _within(name, pin) and path not in allowed
    ]


def executed_data(root: Path) -> list[str]:
    """Uses of what executes data, and arrays that may hold pickles."""
    found = []
    for path, tree in modules(root).items():
        named = names(tree)
        found += [f"{path} names {n}" for n in named for bad in EXECUTES_DATA if _within(n, bad)]
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                refused = isinstance(node.value, ast.Constant) and node.value.value is False
                found += [] if refused else [f"{path}:{node.value.lineno} allows pickles"]
    return found


def confusing_basenames(root: Path) -> list[str]:
    """Modules named as another one is, here or in the standard library."""
    found = []
    seen: dict[str, str] = {}
    for path in modules(root):
        name = Path(path).stem
        if name in ("__init__", "__main__"):
            continue
        if name in sys.stdlib_module_names:
            found.append(f"{path} shadows the standard library")
        if name in seen:
            found.append(f"{path} is named as {seen[name]} is")
        seen[name] = path
    return found


def without_docstring(root: Path) -> list[str]:
    return [path for path, tree in modules(root).items() if not ast.get_docstring(tree)]


def without_tests(root: Path) -> list[str]:
    """Modules above `storage` without a `tests/test_<module>.py`; `__main__` is the package's."""

    def name(path: Path) -> str:
        return path.parent.name if path.stem == "__main__" else path.stem

    return [
        path
        for path in modules(root)
        if not path.startswith("storage/")
        and Path(path).stem != "__init__"
        and not (root / "tests" / f"test_{name(Path(path))}.py").exists()
    ]


def test_packages_import_only_what_lies_below_them() -> None:
    assert forbidden_imports(ROOT) == []


def test_names_stay_in_the_files_that_they_are_pinned_to() -> None:
    assert named_elsewhere(ROOT) == []


def test_every_pin_holds_something() -> None:
    """A file that no longer names what it may name must lose the right."""
    named = {path: names(tree) for path, tree in modules(ROOT).items()}
    idle = [
        f"{path}: {pin}"
        for pin, allowed in PINS.items()
        for path in allowed
        if not any(_within(name, pin) for name in named.get(path, ()))
    ]
    assert idle == []


def test_nothing_executes_what_it_reads() -> None:
    assert executed_data(ROOT) == []


def test_the_leaves_know_no_model_class() -> None:
    forbidden = {"storage": "torch", "data_service": "torch", "checkpointing": "torch.nn"}
    found = [
        f"{path} names {name}"
        for path, tree in modules(ROOT).items()
        for name in names(tree)
        if (package := path.partition("/")[0]) in forbidden and _within(name, forbidden[package])
    ]
    assert found == []


def test_module_names_are_unique_and_shadow_nothing() -> None:
    assert confusing_basenames(ROOT) == []


def test_every_module_says_what_it_is_for() -> None:
    assert without_docstring(ROOT) == []


def test_every_module_has_a_test_file() -> None:
    assert without_tests(ROOT) == []


def test_checkpointing_does_not_import_export() -> None:
    tree = modules(ROOT)["checkpointing/__init__.py"]
    assert not [name for name in imports(tree) if "export" in name]


def test_importing_does_nothing() -> None:
    """Environment, threads, signal handlers, log handlers and torch's switches stay the same."""
    paths = [Path(path) for path in modules(ROOT)]
    ours = [".".join(path.with_suffix("").parts) for path in paths if path.stem != "__init__"]
    program = f"""
import fsspec, logging, os, signal, tempfile, threading
import numpy, safetensors.torch, tensorboard.summary.writer.record_writer, tiktoken, torch, tyro
import torch.distributed, torch.utils.tensorboard
import checkpointing, importlib, sys
assert "checkpointing.export" not in sys.modules
os.chdir(tempfile.mkdtemp())
def state():
    return (
        dict(os.environ), os.getcwd(), os.listdir(), sys.path[:],
        [t.name for t in threading.enumerate()], len(os.listdir("/proc/self/task")),
        [signal.getsignal(n) for n in signal.valid_signals()],
        logging.getLogger().handlers[:], logging.getLogger().level,
        torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(),
        torch.are_deterministic_algorithms_enabled(),
    )
before = state()
for name in {ours!r}:
    importlib.import_module(name)
after = state()
for one, two in zip(before, after):
    assert one == two, (one, two)
"""
    path = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WRONG = {
    "storage/__init__.py": '"""Places."""\n',
    "storage/places.py": "import launch.config\n",
    "data_service/__init__.py": '"""Data."""\n',
    "data_service/rows.py": '"""Rows."""\nfrom checkpointing import save\nimport os\n'
    "HOME = os.environ['HOME']\n",
    "checkpointing/__init__.py": '"""State."""\n',
    "checkpointing/rows.py": '"""As the other."""\nimport torch as t\nx = t.load("x")\n'
    "def f():\n    import signal\n",
    "trainer/__init__.py": '"""Steps."""\n',
    "trainer/json.py": '"""Shadows."""\nimport torch.distributed as dist\n'
    "import numpy as np\ndist.barrier()\nnp.load('x', allow_pickle=True)\n",
    "launch/__init__.py": '"""Starts."""\n',
    "launch/many.py": '"""Everything that is allowed."""\nimport trainer.json, storage.places\n'
    "from os import getenv\nimport importlib\nimportlib.import_module('tiktoken')\n"
    "model.eval()\neval('1')\n",
}


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """A tree that breaks every rule once or more."""
    for name, text in WRONG.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_each_check_finds_what_is_wrong(wrong: Path) -> None:
    assert forbidden_imports(wrong) == [
        "storage/places.py imports launch.config",
        "data_service/rows.py imports checkpointing.save",
    ]
    elsewhere = named_elsewhere(wrong)
    assert "data_service/rows.py names os.environ" in elsewhere
    assert "checkpointing/rows.py names signal" in elsewhere
    assert "trainer/json.py names torch.distributed.barrier" in elsewhere
    assert "launch/many.py names os.getenv" in elsewhere
    assert "launch/many.py names tiktoken" in elsewhere
    executed = executed_data(wrong)
    assert sorted(executed) == [
        "checkpointing/rows.py names torch.load",
        "launch/many.py names eval",
        "trainer/json.py:5 allows pickles",
    ]
    assert confusing_basenames(wrong) == [
        "checkpointing/rows.py is named as data_service/rows.py is",
        "trainer/json.py shadows the standard library",
    ]
    assert without_docstring(wrong) == ["storage/places.py"]
    assert "launch/many.py" in without_tests(wrong)


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _called(node: ast.Call) -> str:
    return _dotted(node.func).rpartition(".")[2]


def _within(name: str, pin: str) -> bool:
    return name == pin or name.startswith(f"{pin}.")
