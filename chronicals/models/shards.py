"""Safetensors files, read once and front to back: what they hold, and its elements piece by piece; and written so.

A file (huggingface.co/docs/safetensors) is the length of a header, the header (JSON: name -> dtype, shape, begin and
end of its bytes) and the data. The library checks all of that; the data is read here, because its tensors are maps of
the file: their pages count as the process's memory, and a GPU copies from pageable memory at a fraction of its rate.
Two page-locked buffers take turns instead: while one travels to the device, the next part of the file is read.

Left out: several readers at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chronicals.errors import UserError

BUFFER = 32 * 2**20  # bytes; there are two
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = FLOATS | {"U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `dtype` by the format's name, bytes [start, stop) of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class _Part:
    """Some of a tensor's bytes, [start, stop) of its file."""

    name: str
    tensor: Stored
    start: int
    stop: int


def stored_tensors(file: Path) -> dict[str, Stored]:
    """Name -> where it is. Raises UserError where the file is damaged."""
    try:
        with safe_open(file, framework="pt"):  # checks lengths, offsets and shapes against each other
            pass
        with open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header: dict[str, Any] = json.loads(raw.read(length))
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error
    data = 8 + length
    return {
        name: Stored(file, told["dtype"], tuple(told["shape"]), *(data + offset for offset in told["data_offsets"]))
        for name, told in header.items()
        if name != "__metadata__"
    }


def write_tensors(file: Path, told: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[Tensor]) -> None:
    """Writes a file of tensors that come one at a time; only one of them is in memory.

    Args:
        file: to write.
        told: name -> (dtype, shape), in the tensors' order.
        tensors: on the CPU.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in told.items():
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins at a multiple of 8
    with open(file, "wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, (dtype, shape)), tensor in zip(told.items(), tensors, strict=True):
            assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), name
            out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def damaged(file: Path, why: object) -> UserError:
    return UserError(f"the file is damaged or cut short ({why})", "download it again", file=file)


def stream(tensors: Mapping[str, Stored], device: torch.device) -> Iterator[tuple[str, int, Tensor]]:
    """Every element of `tensors`, in the files' order.

    Args:
        tensors: name -> where it is; of floating-point dtypes or bytes.
        device: where the elements are going.

    Yields:
        (name, index of the first element in the flat tensor, elements (n,) in their stored dtype): in host memory,
        page-locked where `device` is a GPU. They may be copied there without blocking on the current stream, and are
        overwritten soon after the next ones are asked for.
    """
    gpu = device.type == "cuda"
    buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=gpu) for _ in range(2)]
    sent: list[torch.cuda.Event | None] = [None, None]  # when the buffer has left
    for number, parts in enumerate(_blocks(tensors)):
        turn = number % 2
        buffer, event = buffers[turn], sent[turn]
        if event is not None:
            event.synchronize()
        start = parts[0].start
        _read(parts[0].tensor.file, start, buffer.numpy().data[: parts[-1].stop - start])
        for part in parts:
            dtype = _DTYPES[part.tensor.dtype]
            index = (part.start - part.tensor.start) // dtype.itemsize
            yield part.name, index, buffer[part.start - start : part.stop - start].view(dtype)
        if gpu:
            sent[turn] = torch.cuda.current_stream(device).record_event()
    for event in sent:  # whoever reads them next may do so on another stream
        if event is not None:
            event.synchronize()


def _blocks(tensors: Mapping[str, Stored]) -> Iterator[list[_Part]]:
    """Parts that lie together in a file and fit a buffer, where each begins at a multiple of its element's size."""
    block: list[_Part] = []
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start)):
        size, start = _DTYPES[tensor.dtype].itemsize, tensor.start
        while start < tensor.stop:
            filled = start - block[0].start if block else 0
            same = not block or block[0].tensor.file == tensor.file
            if not same or filled % size or filled + size > BUFFER:
                yield block
                block = []
                continue
            stop = min(tensor.stop, start + (BUFFER - filled) // size * size)
            block.append(_Part(name, tensor, start, stop))
            start = stop
    if block:
        yield block


def _read(file: Path, start: int, into: memoryview) -> None:
    with open(file, "rb", buffering=0) as raw:
        raw.seek(start)
        while into:
            count = raw.readinto(into)
            if not count:
                raise damaged(file, "it ends too early")
            into = into[count:]
