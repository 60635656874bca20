from checkpointing.group import Group, Solo
from tests.groups import on_ranks


def test_a_group_of_one_hears_itself() -> None:
    group: Group = Solo()
    assert group.gather({"a": 1}) == [{"a": 1}]
    assert group.broadcast("x") == "x"


def test_all_ranks_hear_all() -> None:
    assert on_ranks(3, lambda group: group.gather(group.rank)) == [[0, 1, 2]] * 3
    assert on_ranks(3, lambda group: group.broadcast(group.rank)) == [0, 0, 0]
