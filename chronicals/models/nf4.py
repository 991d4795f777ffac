"""A decoder whose layers' projections are NF4 (kernels/nf4.py): their weights in 4 bits, and how they are loaded.

Before each use, forward or backward, a weight is made wide into a buffer that all weights of its shape share: what is
kept in 16 bits is one buffer a shape, at a fixed address, as CUDA graphs want it. Such weights are frozen.

They are read from a checkpoint of bitsandbytes, whose tensors are, for a Hugging Face module,

    weight                                  codes, (N K / 2, 1) uint8
    weight.absmax                           uint8, or float32 without double quantisation
    weight.nested_absmax                    float32, a value for each 256 blocks
    weight.quant_map, .nested_quant_map     the tables of both
    weight.quant_state.bitsandbytes__nf4    JSON: shape, block sizes, offset of absmax

or made of 16 or 32 bits while they come in, module by module. Ours stacks several modules by their rows, each with the
scales it has alone.

Left out: training or saving of such weights, quantised heads and embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from chronicals.errors import UserError
from chronicals.kernels import nf4
from chronicals.kernels.nf4 import NF4Weight
from chronicals.kernels.ops import Ops
from chronicals.models.decoder import Decoder
from chronicals.models.projection import Projection, Store
from chronicals.models.quantization import NF4
from chronicals.models.shards import FLOATS, Stored

STATE = "weight.quant_state.bitsandbytes__nf4"
Modules = Mapping[str, tuple[int, int]]
_MEND = "take config.json and weights from the same repository"


class WideBuffers:
    """Where weights are made wide: one buffer for all that have the same shape and layout, as long as one of them does.

    Its memory stays where it is, on the device it was loaded to.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._made: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()

    def get(self, rows: int, columns: int, layout: Any = None) -> Tensor:
        """(rows, columns), zeros at first; the same one for the same `layout`, whatever that says to the caller."""
        key = (rows, columns, layout)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = torch.zeros(rows, columns, device=self.device, dtype=self.dtype)
        return found


class NF4Store(Store):
    """A weight in NF4. Its codes are a frozen parameter, so that whoever lists weights sees them.

    Attributes:
        wide: where the weights of a model are made wide.
    """

    absmax: Tensor
    scales: Tensor | None
    tables: Tensor

    def __init__(self, weight: NF4Weight, wide: WideBuffers, ops: Ops) -> None:
        super().__init__()
        self.codes = nn.Parameter(weight.codes, requires_grad=False)
        for name in ("absmax", "scales", "tables"):
            self.register_buffer(name, getattr(weight, name))
        self.wide, self.ops = wide, ops

    def into(self, weight: Tensor) -> Tensor:
        return self.ops.nf4_dequantize(NF4Weight(self.codes.detach(), self.absmax, self.scales, self.tables), weight)


@dataclass
class _Module:
    """A Hugging Face module on its way in: its tensors, and how many elements of them are still to come."""

    name: str
    shape: tuple[int, int]
    quantised: bool  # in the checkpoint
    stored: dict[str, Stored]  # what comes behind its name -> tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    missing: int = 0
    weight: NF4Weight | None = None

    def error(self, reason: str, mend: str = _MEND) -> UserError:
        return UserError(f"{self.name}: {reason}", mend, file=self.stored["weight"].file)


class NF4Gather:
    """The layers' projections of a model, put together from the pieces in which a checkpoint is read.

    Args:
        model: behind `give_up_weights`.
        modules: path of each of these projections -> its Hugging Face modules and the shapes of their weights.
        stored: tensors of the checkpoint by name.
        quantization: of the checkpoint's weights, or what is to be made of them.

    Attributes:
        wanted: the tensors that belong to these projections.

    Raises:
        UserError: a tensor is missing, or has another shape or dtype than belongs there.
    """

    def __init__(
        self,
        model: Decoder,
        modules: Mapping[str, Modules],
        stored: Mapping[str, Stored],
        quantization: NF4,
    ) -> None:
        self.dtype, self.double_quant = model.embed_tokens.weight.dtype, quantization.double_quant
        self.device, self.ops = model.embed_tokens.weight.device, model.ops
        self.wide = WideBuffers(self.device, self.dtype)
        self.projections: list[tuple[Projection, list[_Module]]] = []
        self._owner: dict[str, tuple[int, _Module, str]] = {}  # tensor -> its projection, module, end of its name
        self.wanted: dict[str, Stored] = {}
        for path, shapes in modules.items():
            projection = model.get_submodule(path)
            assert isinstance(projection, Projection)
            found = [self._module(name, shape, stored) for name, shape in shapes.items()]
            for module in found:
                for suffix, tensor in module.stored.items():
                    self._owner[f"{module.name}.{suffix}"] = len(self.projections), module, suffix
                    self.wanted[f"{module.name}.{suffix}"] = tensor
            self.projections.append((projection, found))

    def _module(self, name: str, shape: tuple[int, int], stored: Mapping[str, Stored]) -> _Module:
        quantised = f"{name}.{STATE}" in stored
        elements = shape[0] * shape[1]
        expected: dict[str, tuple[tuple[str, ...], int | None]] = {"weight": (tuple(FLOATS), elements)}
        if quantised:
            blocks = elements // nf4.BLOCK
            expected = {
                "weight": (("U8",), elements // 2),
                "weight.absmax": (("U8" if self.double_quant else "F32",), blocks),
                "weight.quant_map": (("F32",), len(nf4.VALUES)),
                STATE: (("U8",), None),
            }
            if self.double_quant:
                expected["weight.nested_absmax"] = (("F32",), -(-blocks // nf4.NESTED_BLOCK))
                expected["weight.nested_quant_map"] = (("F32",), 256)
        module = _Module(name, shape, quantised, {})
        for suffix, (dtypes, count) in expected.items():
            if f"{name}.{suffix}" not in stored:
                file = next(iter(stored.values())).file.parent
                raise UserError(f"tensor {name}.{suffix} is missing", _MEND, file=file)
            tensor = stored[f"{name}.{suffix}"]
            module.stored[suffix] = tensor
            size = _elements(tensor)
            if tensor.dtype not in dtypes or (count is not None and size != count):
                raise module.error(
                    f"{suffix} holds {size} of {tensor.dtype}, config.json asks for {count} of {' or '.join(dtypes)}"
                )
            if not quantised and tensor.shape != shape:
                raise module.error(f"{suffix} has shape {tensor.shape}, config.json asks for {shape}")
            module.missing += size
        if shape[1] % nf4.BLOCK:
            raise module.error(
                f"its rows have {shape[1]} elements, and blocks of {nf4.BLOCK} would not end with them",
                "train this model in 16 bits: remove load_in_4bit",
            )
        return module

    def put(self, name: str, start: int, piece: Tensor) -> None:
        """Elements of the tensor `name`, from its `start`th."""
        number, module, suffix = self._owner[name]
        if suffix not in module.tensors:
            stored = module.stored[suffix]
            on_host = suffix not in ("weight", "weight.absmax", "weight.nested_absmax")
            module.tensors[suffix] = torch.empty(
                _elements(stored), dtype=piece.dtype, device="cpu" if on_host else self.device
            )
        target = module.tensors[suffix][start : start + len(piece)]
        target.copy_(piece, non_blocking=target.is_cuda)
        module.missing -= len(piece)
        if module.missing:
            return
        module.weight = self._read(module) if module.quantised else self._quantise(module)
        module.tensors.clear()
        projection, parts = self.projections[number]
        weights = [part.weight for part in parts if part.weight is not None]
        if len(weights) == len(parts):
            try:
                stacked = weights[0] if len(weights) == 1 else nf4.stack(weights)
            except ValueError as error:
                raise module.error(str(error)) from error
            projection.store = NF4Store(stacked, self.wide, self.ops)
            projection.weight = self.wide.get(*stacked.shape)  # type: ignore[assignment]  # where the store makes it
            for part in parts:
                part.weight = None

    def _quantise(self, module: _Module) -> NF4Weight:
        weight = module.tensors["weight"].view(module.shape)
        if weight.dtype not in nf4.DTYPES:
            weight = weight.to(self.dtype)
        return nf4.quantize(weight, double_quant=self.double_quant)

    def _read(self, module: _Module) -> NF4Weight:
        tensors, (rows, columns) = module.tensors, module.shape
        try:
            state = json.loads(bytes(tensors[STATE].tolist()))
            assert isinstance(state, dict)
        except (ValueError, AssertionError) as error:
            raise module.error(f"{STATE} is not JSON", "download it again") from error
        expected = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "shape": [rows, columns]}
        if self.double_quant:
            expected |= {"nested_blocksize": nf4.NESTED_BLOCK, "nested_dtype": "float32"}
        for key, value in expected.items():
            if state.get(key) != value:
                raise module.error(f"{key} is {state.get(key)!r}, {value!r} is supported", "quantise it on load")
        tables = nf4.tables(torch.device("cpu"), False)
        if not torch.equal(tensors["weight.quant_map"], tables):
            raise module.error("weight.quant_map holds other values than those of NF4", "quantise it on load")
        codes, absmax = tensors["weight"].view(rows, -1), tensors["weight.absmax"].view(rows, -1)
        if not self.double_quant:
            return NF4Weight(codes, absmax, None, nf4.tables(self.device, False))
        tables = torch.cat((tables, tensors["weight.nested_quant_map"]))
        usual = torch.equal(tables, nf4.tables(torch.device("cpu")))
        largest = tensors["weight.nested_absmax"]
        scales = torch.stack((largest, torch.full_like(largest, state["nested_offset"])), dim=1)
        return NF4Weight(codes, absmax, scales, nf4.tables(self.device) if usual else tables.to(self.device))


def _elements(tensor: Stored) -> int:
    return torch.Size(tensor.shape).numel()


def give_up_weights(model: Decoder, paths: Iterable[str]) -> None:
    """The projections at `paths` have no weight until they get one in NF4."""
    for path in paths:
        del model.get_submodule(path).weight
