"""What layers keep for backward, in the host's memory meanwhile (Ren et al. 2021, ZeRO-Offload, for activations).

A unit of a layer (layer.py) hands over what it saved when its forward pass ends. Copies run beside the work, on a
stream of their own: to page-locked memory while the units behind it run forward, and back, in time, while they run
backward. Whoever keeps more there computes less again: at 8 billion parameters and 8192 tokens a layer's forward pass
takes as long as PCIe's 5th generation takes for what `recompute: mlp` keeps.

A tensor goes with all of the memory that it is a view of, once for all tensors that share it, so the room behind its
rows is there again too. Small tensors stay. All of it can be recorded in a CUDA graph: places in the host's memory are
taken in the same order in each pass, and the device's memory is held until a copy is known to have ended, as an
allocator's `record_stream` would give it back only behind the recording. On a CPU the copies are plain ones.

Left out: disks, and compression, which would change values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chronicals.errors import UserError

LARGE = 2**22  # bytes from which on memory is worth a copy
CHUNK = 2**28  # bytes of page-locked memory taken at once; a power of 2, to which torch rounds them
ON_THE_WAY = 4  # copies to the host, two layers', that need not have ended when the next begins; what they read is held


@dataclass(frozen=True)
class _View:
    """A tensor in memory number `memory`."""

    memory: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class Parcel:
    """What one unit handed over: small tensors, and views of memory that is on the host."""

    tensors: list[Tensor | _View | None]
    places: list[list[Tensor]]  # of each memory, its pieces on the host
    pass_number: int
    back: list[Tensor] = field(default_factory=list)  # the memory on the device again
    event: torch.cuda.Event | None = None


class Offload:
    """The host's memory for one model's activations, and the copies.

    Args:
        device: where the activations are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._chunks: list[Tensor] = []
        self._pass = 0
        self.start()

    @property
    def host_bytes(self) -> int:
        """Of page-locked memory."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def start(self) -> None:
        """A new forward pass; what an earlier one handed over is lost."""
        self._pass += 1
        self._used = 0  # bytes of the host's memory
        self._parcels: list[Parcel] = []  # not asked for yet
        self._loaded = 0  # of these, from the end
        self._leaving: deque[tuple[torch.cuda.Event | None, list[Tensor]]] = deque()

    def put(self, tensors: Sequence[Tensor | None]) -> Parcel:
        """Begins to copy; nobody may write to the tensors afterwards."""
        parcel, leaving, numbers = Parcel([], [], self._pass), list[Tensor](), dict[int, int]()
        for tensor in tensors:
            if tensor is None or tensor.untyped_storage().nbytes() < LARGE:
                parcel.tensors.append(None if tensor is None else tensor.detach())
                continue
            storage = tensor.untyped_storage()
            number = numbers.setdefault(storage.data_ptr(), len(leaving))
            if number == len(leaving):
                leaving.append(torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage))
            view = _View(number, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
            parcel.tensors.append(view)
        parcel.places = [self._place(len(memory)) for memory in leaving]
        while len(self._leaving) >= ON_THE_WAY:
            self._wait_for(self._leaving.popleft()[0])
        event = self._copy([(place, memory) for place, memory in zip(parcel.places, leaving, strict=True)], out=True)
        self._leaving.append((event, leaving))
        self._parcels.append(parcel)
        return parcel

    def settle(self) -> None:
        """The forward pass is over: waits for the copies, whose memory is free then."""
        while self._leaving:
            self._wait_for(self._leaving.popleft()[0])

    def ahead(self) -> None:
        """Begins to bring back the parcel that is asked for next, if nothing is on its way."""
        if self._loaded == 0 and self._parcels:
            self._load(self._parcels[-1])
            self._loaded = 1

    def get(self, parcel: Parcel) -> list[Tensor | None]:
        """What was put, by the order of backward: the last parcel first."""
        assert parcel.pass_number == self._pass, "another forward pass has taken its memory"
        assert parcel is self._parcels[-1], "parcels come back in reverse"
        self.ahead()
        self._parcels.pop()
        self._loaded = 0
        self._wait_for(parcel.event)
        self.ahead()
        back, parcel.back = parcel.back, []
        return [
            back[t.memory].view(t.dtype).as_strided(t.shape, t.stride, t.offset) if isinstance(t, _View) else t
            for t in parcel.tensors
        ]

    def _place(self, size: int) -> list[Tensor]:
        """The next `size` bytes of the host's memory, in pieces."""
        pieces = []
        while size:
            number, start = divmod(self._used, CHUNK)
            if number == len(self._chunks):
                self._chunks.append(self._chunk())
            piece = self._chunks[number][start : start + size]
            pieces.append(piece)
            self._used, size = self._used + len(piece), size - len(piece)
        return pieces

    def _chunk(self) -> Tensor:
        try:
            return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self._copies is not None)
        except RuntimeError as error:  # torch has no class for it
            taken = len(self._chunks) * CHUNK / 2**30
            raise UserError(
                f"the machine has no more page-locked memory for activation_offloading, which has {taken:.1f} GiB",
                "set activation_offloading_layers, or raise its limit",
            ) from error

    def _load(self, parcel: Parcel) -> None:
        sizes = [sum(len(piece) for piece in place) for place in parcel.places]
        parcel.back = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
        parcel.event = self._copy(list(zip(parcel.places, parcel.back, strict=True)), out=False)

    def _copy(self, pairs: list[tuple[list[Tensor], Tensor]], *, out: bool) -> torch.cuda.Event | None:
        """Between pieces on the host and memory on the device, behind all work queued so far; the event that ends
        it."""
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for place, memory in pairs:
                for there, here in zip(place, memory.split([len(piece) for piece in place]), strict=True):
                    target, source = (there, here) if out else (here, there)
                    target.copy_(source, non_blocking=True)
            return None if self._copies is None else self._copies.record_event()

    def _wait_for(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
