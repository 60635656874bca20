import hashlib
from typing import Any

import pytest
import torch

from checkpointing import digest
from checkpointing.digest import checkpoint_digest, chunk_digests, dtype_named
from checkpointing.layout import specs_of
from checkpointing.snapshot import flat_bytes


def chunks(tensor: torch.Tensor) -> list[str]:
    return chunk_digests(memoryview(flat_bytes(tensor).numpy()))  # type: ignore[arg-type]


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor's entry in a manifest."""
    [spec] = specs_of({"t": tensor}).values()
    return {"dtype": spec.dtype, "shape": list(spec.shape), "chunks": chunks(tensor)}


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_a_description_is_of_the_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(6)[: max(1, torch.Size(shape).numel())].to(dtype)
    tensor = tensor[: torch.Size(shape).numel()].reshape(shape)
    found = describe(tensor)
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert found["chunks"] == [hashlib.sha256(raw).hexdigest()]
    assert found["shape"] == list(shape)
    assert dtype_named(found["dtype"]) is dtype


def test_chunks_are_16_mib_and_the_last_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest.CHUNK_BYTES == 16 * 2**20
    monkeypatch.setattr(digest, "CHUNK_BYTES", 8)
    tensor = torch.arange(5, dtype=torch.float32)
    raw = tensor.numpy().tobytes()
    expected = [hashlib.sha256(raw[i : i + 8]).hexdigest() for i in (0, 8, 16)]
    assert chunks(tensor) == expected


def test_a_view_that_is_not_contiguous_has_the_digest_of_its_values() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert describe(tensor.t()) == describe(tensor.t().contiguous())


def test_the_digest_covers_every_bit_and_name_and_not_the_order() -> None:
    one = {"a": describe(torch.zeros(3)), "b": describe(torch.ones(3))}
    exact = {"step": 1, "scaler": {"scale": 1.0}}
    base = checkpoint_digest(one, exact)
    assert checkpoint_digest(dict(reversed(one.items())), exact) == base
    changed = [
        ({**one, "a": describe(torch.tensor([0.0, 0.0, -0.0]))}, exact),
        ({**one, "a": describe(torch.zeros(3, 1))}, exact),
        ({**one, "a": describe(torch.zeros(3, dtype=torch.int32))}, exact),
        ({"a2": one["a"], "b": one["b"]}, exact),
        ({"a": one["b"], "b": one["a"]}, exact),
        (one, {**exact, "step": 2}),
    ]
    digests = {checkpoint_digest(tensors, state) for tensors, state in changed}
    assert len(digests) == len(changed)
    assert base not in digests


def test_where_tensors_lie_does_not_matter() -> None:
    table = {"a": {**describe(torch.zeros(3)), "object": "r000-p00"}}
    assert checkpoint_digest(table, {}) == checkpoint_digest({"a": describe(torch.zeros(3))}, {})


def test_a_dtype_that_no_checkpoint_holds_has_no_name() -> None:
    assert dtype_named("complex64") is None
    assert dtype_named("load") is None
