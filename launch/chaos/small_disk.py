"""A file system of few MiB, seen through the mount namespace of a helper process.

It is gone with the helper, which ends when this process does.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = "mount -t tmpfs -o size=4m none /mnt && echo mounted && exec cat"


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """`folder` is the root of the file system."""

    folder: Path

    def fill(self) -> None:
        """Write until nothing more fits."""
        with suppress(OSError), open(self.folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Remove what `fill` has written."""
        (self.folder / "filler").unlink()


@contextmanager
def small_disk() -> Iterator[SmallDisk]:
    """Mount one of 4 MiB. Raises OSError where that is not permitted."""
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", _SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as helper:
        assert helper.stdout is not None
        said = helper.stdout.readline().strip()
        if said != "mounted":
            raise OSError(f"a small disk cannot be mounted here: {said}")
        yield SmallDisk(Path(f"/proc/{helper.pid}/root/mnt"))
