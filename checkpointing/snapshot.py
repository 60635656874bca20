"""Copies training state to host memory while training goes on.

The copy runs beside the next forward and backward pass, which do not change the state; only the
update must wait for it (`wait`). The memory is an arena, allocated once and used for every save,
laid out as the objects that will be uploaded, headers included: nothing is copied again.

Covers: CPU and CUDA tensors (pinned memory, a stream of its own).
Does not cover: an update that does not wait; what is stored is then neither the old state nor the
new one.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from checkpointing.layout import ObjectLayout, Piece

_ALIGNMENT = 4096


class Arena:
    """Host memory for the objects of one process's share, pinned for a GPU."""

    def __init__(self, objects: Sequence[ObjectLayout], *, pinned: bool) -> None:
        self.objects = tuple(objects)
        self._starts = []
        size = 0
        for one in objects:
            self._starts.append(size)
            size += -(-one.size_bytes // _ALIGNMENT) * _ALIGNMENT
        memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
        first = -memory.data_ptr() % _ALIGNMENT  # a disk takes aligned memory past the page cache
        self._memory = memory[first : first + size]
        self._ready = False
        self._making_ready = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Bytes that the arena takes."""
        return self._memory.numel()

    def make_ready(self) -> None:
        """Have the system give the memory, which takes longer than a copy, and write headers."""
        with self._making_ready:  # or it would still write over a copy that has begun
            if self._ready:
                return
            self._memory.zero_()
            for number, one in enumerate(self.objects):
                self.data(number)[: len(one.header)] = one.header
            self._ready = True

    def data(self, number: int) -> memoryview:
        """The bytes of an object. They are whole once its snapshot is `finished`."""
        start = self._starts[number]
        return memoryview(
            self._memory[start : start + self.objects[number].size_bytes].numpy()  # type: ignore[arg-type]
        )

    def places(self) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece and its memory, flat uint8."""
        for start, one in zip(self._starts, self.objects, strict=True):
            for piece, offset in one.offsets():
                first = start + offset
                yield piece, self._memory[first : first + piece.stop - piece.start]


class Snapshot:
    """One copy of a state into an arena, under way from the moment it is made.

    With `compare`, also a fingerprint of the whole state, of this process's share and the others',
    by which processes compare their replicas.
    """

    def __init__(
        self, arena: Arena, tensors: Mapping[str, Tensor], copier: Executor, *, compare: bool
    ) -> None:
        self.arena = arena
        self._fingerprints: dict[str, Tensor] = {}
        self._copied: Future[None] | None = None
        self._event: torch.cuda.Event | None = None
        pairs = [
            (place, flat_bytes(tensors[piece.tensor])[piece.start : piece.stop])
            for piece, place in arena.places()
        ]
        whole = dict(tensors) if compare else {}
        if any(tensor.is_cuda for tensor in tensors.values()):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._copy(pairs, whole)
                for _, source in pairs:
                    if source.is_cuda:
                        source.record_stream(stream)
            self._event = stream.record_event()
        else:
            self._copied = copier.submit(self._copy, pairs, whole)

    def wait(self) -> None:
        """Call before the state changes. With CUDA the GPU waits, and this thread does not."""
        if self._copied is not None:
            self._copied.result()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def finished(self) -> None:
        """Wait until every byte is in the arena. For the thread that uploads it."""
        if self._copied is not None:
            self._copied.result()
        if self._event is not None:
            self._event.synchronize()

    def fingerprints(self) -> dict[str, int]:
        """The fingerprint of each tensor, after `finished`; none without `compare`."""
        return {name: int(value) for name, value in self._fingerprints.items()}

    def _copy(self, pairs: Sequence[tuple[Tensor, Tensor]], whole: Mapping[str, Tensor]) -> None:
        self.arena.make_ready()
        for place, source in pairs:
            place.copy_(source, non_blocking=True)
        for name, tensor in whole.items():
            self._fingerprints[name] = fingerprint(tensor)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, row-major, uint8; a view where that is possible."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def fingerprint(tensor: Tensor) -> Tensor:
    """The sum of the tensor's 64-bit words modulo 2**64, on its device: equal for equal replicas.

    Random differences pass unseen with a probability of 2**-64; it is no protection from anybody.
    """
    data = flat_bytes(tensor)
    whole = len(data) // 8 * 8
    if data.storage_offset() % 8:
        data = data.clone()
    return data[:whole].view(torch.int64).sum() + data[whole:].sum(dtype=torch.int64)
