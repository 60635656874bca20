"""Other processes that use a folder of cached objects, to be stopped and killed."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_service.cache_folder import CacheFolder

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1000


@contextmanager
def other_process(folder: CacheFolder, *lines: str) -> Iterator[subprocess.Popen[str]]:
    """A process that does something with the same folder, says "ready", and waits."""
    program = "\n".join(
        (
            "import sys",
            "from pathlib import Path",
            "from data_service.cache_folder import CacheFolder",
            f"folder = CacheFolder(Path({str(folder.folder)!r}), limit_bytes={folder.limit_bytes})",
            *lines,
            "print('ready', flush=True)",
            "sys.stdin.read()",
        )
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
