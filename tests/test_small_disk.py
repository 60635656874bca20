import errno

import pytest

from launch.chaos.scenarios import lacking
from launch.chaos.small_disk import small_disk


def test_a_small_disk_is_full_until_it_is_freed_and_gone_at_the_end() -> None:
    if why := lacking(frozenset({"mounts"})):
        pytest.skip(why)
    with small_disk() as disk:
        disk.fill()
        with pytest.raises(OSError) as raised:
            (disk.folder / "more").write_bytes(bytes(8192))
        assert raised.value.errno == errno.ENOSPC
        disk.free()
        (disk.folder / "some").write_bytes(bytes(8192))
    assert not disk.folder.exists()
