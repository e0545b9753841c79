"""A runner whose whole pass is one call into native.cpp, for CPUs: its weights packed, its cache kept there.

N tokens of a pass, W of them whose scores are wanted, V vocabulary, D width.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from langmill.families.peft import LowRank
from langmill.infer.native_adapt import adapter
from langmill.infer.native_build import library, not_built
from langmill.model.config import Learned, Rope, Sinusoidal, StackConfig
from langmill.model.positions import rotary, sinusoids
from langmill.model.transformer import Stack, Transformer

Ids = NDArray[np.int64]
GROUP, LANES = 32, 16
BLOCK = 64 << 20  # bytes of packed matrices that stand together
FLOAT, INT8, INT4, INT4_LOWS = range(4)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


class _Linear(Structure):
    _fields_ = [("kind", c_int32), ("inputs", c_int32), ("outputs", c_int32), ("has_bias", c_int32),
                ("data", c_void_p), ("bias", c_void_p)]  # fmt: skip


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Layer(Structure):
    _fields_ = [
        *((f"{name}_norm", _Norm) for name in ("attention", "mlp", "q", "k")),
        *((name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("window", c_int32), ("unused", c_int32),
    ]  # fmt: skip


class _Shape(Structure):
    _fields_ = [
        *((name, c_int32) for name in (
            "dim", "layers", "heads", "kv_heads", "head_dim", "hidden", "vocab",
            "rms", "post", "activation", "gated", "rope", "causal", "kv_bits",
            "slots", "length", "tokens", "threads",
        )),
        *((name, c_float) for name in ("eps", "scale", "embedding_scale", "head_scale")),
        ("layer", POINTER(_Layer)), ("embedding_norm", _Norm), ("last_norm", _Norm),
        ("embedding", _Linear), ("head", _Linear), ("places", c_void_p), ("angles", c_void_p),
    ]  # fmt: skip


class _Call(Structure):
    _fields_ = [
        ("n", c_int32), *((name, c_void_p) for name in ("ids", "slots", "places", "limits", "starts")),
        ("wanted", c_int32), *((name, c_void_p) for name in ("which", "logits", "states", "adapters")),
    ]  # fmt: skip


def refusal(model: Any) -> str | None:
    """Why native.cpp cannot run this model, for people to read; None where it can."""
    if not isinstance(model, Transformer):
        return "only a Transformer runs there"
    if model.encoder is not None and model.decoder is not None:
        return "models that read with an encoder and write with a decoder do not run there"
    c = model.config.main
    if isinstance(c.position, Rope) and c.position.scaling and c.position.scaling.kind == "dynamic":
        return "rotary frequencies that grow with the length do not run there"
    if not isinstance(c.position, Rope | Learned | Sinusoidal):
        return "attention with learned distances does not run there"
    if model.head_dense is not None and model.config.writes:
        return "an output layer with a dense layer before it does not run there"
    return not_built()


class NativeRunner:
    """A `Runner` for one model on this machine's CPU; see runner.py.

    slots: rows of the cache. length: places in each. tokens: most tokens of one pass. threads: None for torch's
    number. kv_bits: 32, or 8 for keys and values rounded to 8 bits with a step each. ValueError where `refusal` has
    one; MemoryError where the cache finds no room. The weights are copied once, packed; float ones become float32.
    release: take each matrix from the model as it is packed, which is good for nothing else afterwards, so that there
    are never two copies of all.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int,
        length: int,
        tokens: int = 512,
        threads: int | None = None,
        kv_bits: int = 32,
        release: bool = False,
    ) -> None:
        if reason := refusal(model):
            raise ValueError(reason)
        self.slots, self.length, self.vocab, self.tokens = slots, length, model.config.vocab, tokens
        self.positions = min(length, model.config.length)
        self._lib = _bound()
        self.adapters = 0  # that `adapt` was given
        self._kept: list[object] = []  # what the library points into lives as long as this
        self._release = release
        self._next = self._left = 0  # of the block that matrices are packed into
        stack, c = model.main, model.config.main
        self.width = -(-c.dim // GROUP) * GROUP
        self._layers = (_Layer * c.layers)(*(self._layer(stack, number) for number in range(c.layers)))
        embedding = self._linear(model.tokens, c.dim)
        scored = model.config.head is not None and model.config.writes
        head = self._linear(model.head, c.dim) if scored and model.head is not None else embedding
        if scored and model.output_bias is not None:
            head = _Linear.from_buffer_copy(head)
            head.bias, head.has_bias = self._padded(model.output_bias, LANES), 1
        shape = _Shape(
            c.dim, c.layers, c.heads, c.kv_heads, c.head_dim, c.hidden, self.vocab,
            c.norm == "rms", c.norm_order == "post", ACTIVATIONS.index(c.activation), c.gated,
            isinstance(c.position, Rope), c.causal, kv_bits, slots, length, tokens,
            threads or torch.get_num_threads(), c.norm_eps, c.scale or c.head_dim**-0.5,
            stack.embedding_scale, model.config.head.scale if scored and model.config.head else 1.0,
            self._layers, self._norm(stack.embedding_norm), self._norm(stack.norm), embedding, head,
            *self._tables(stack, c),
        )  # fmt: skip
        self._handle = c_void_p(self._lib.model_new(byref(shape)))
        if not self._handle:
            raise MemoryError(f"not enough memory for {slots} rows of {length} keys and values")
        self._free = weakref.finalize(self, self._lib.model_free, self._handle)

    def run(
        self, tokens_N: Ids, slots_N: Ids, places_N: Ids, wanted_W: Ids, adapters_N: Ids | None = None
    ) -> Tensor:
        """Scores (W, V) of the wanted tokens. adapters_N: each one's number by `adapt`, 0 for none; None: none of any.
        Tokens of one adapter that stand together cost less."""
        whole = -(-self.vocab // LANES) * LANES
        logits_WV = torch.empty(len(wanted_W), whole)
        self._run(
            tokens_N, slots_N, places_N, places_N + 1, wanted_W, logits_WV.data_ptr(), None, adapters_N=adapters_N
        )  # fmt: skip
        return logits_WV[:, : self.vocab]

    def adapt(self, changes: Mapping[str, LowRank]) -> int:
        """Keep an adapter beside the weights, for `run`; its number, from 1 on.

        changes: by the names of the model's linear layers. ValueError names one that is no layer of a block,
        MemoryError where there is no room.
        """
        layers = adapter(changes, len(self._layers), self._packed)
        number: int = self._lib.model_adapt(self._handle, layers)
        if not number:
            raise MemoryError(f"not enough memory for an adapter beside {self.adapters}")
        self._kept.append(layers)
        self.adapters = number
        return number

    def states(
        self, tokens_N: Ids, slots_N: Ids, places_N: Ids, limits_N: Ids, starts_N: Ids | None = None
    ) -> Tensor:
        """Last states (N, D); a token sees the places of its slot up to `limits_N`, from `starts_N` on.

        starts_N: several texts may stand in one slot, each from a multiple of 16 on, where its positions begin.
        """
        states_ND = torch.empty(len(tokens_N), self.width)
        none = np.empty(0, dtype=np.int64)
        self._run(tokens_N, slots_N, places_N, limits_N, none, None, states_ND.data_ptr(), starts_N)
        return states_ND

    def copy(self, source: int, target: int, length: int) -> None:
        self._lib.model_copy(self._handle, source, target, length)

    def _run(
        self, ids: Ids, slots: Ids, places: Ids, limits: Ids, wanted: Ids, logits: Any, states: Any,
        starts: Ids | None = None, adapters_N: Ids | None = None,
    ) -> None:  # fmt: skip
        starts = np.zeros_like(places) if starts is None else starts
        given = [
            np.ascontiguousarray(a, dtype=np.int64) for a in (ids, slots, places, limits, starts, wanted)
        ]
        if len(ids) > self.tokens:
            raise ValueError(f"{len(ids)} tokens in a pass made for {self.tokens}")
        if len(ids) and not (
            0 <= given[1].min() <= given[1].max() < self.slots
            and 0 <= given[2].min() <= given[2].max() < self.length
            and 0 <= given[0].min() <= given[0].max() < self.vocab
            and 0 <= (given[2] - given[4]).min() <= (given[2] - given[4]).max() < self.positions
            and (given[2] < given[3]).all()
            and given[3].max() <= self.length
            and not (given[4] % LANES).any()
        ):
            raise ValueError("a token, slot or place out of range")
        adapted = None if adapters_N is None else np.ascontiguousarray(adapters_N, dtype=np.int64)
        if adapted is not None and not (
            len(adapted) == len(ids) and 0 <= adapted.min() <= adapted.max() <= self.adapters
        ):
            raise ValueError("an adapter out of range")
        at = [a.ctypes.data for a in given]
        at_adapters = None if adapted is None else adapted.ctypes.data
        call = _Call(len(ids), *at[:5], len(wanted), at[5], logits, states, at_adapters)
        self._lib.model_run(self._handle, byref(call))

    def _layer(self, stack: Stack, number: int) -> _Layer:
        block: Any = stack.blocks[number]
        attention, mlp, c = block.attention, block.mlp, stack.config
        wide = c.heads * c.head_dim
        return _Layer(
            self._norm(block.attention_norm), self._norm(block.mlp_norm),
            self._norm(attention.q_norm), self._norm(attention.k_norm),
            self._linear(attention.q, c.dim), self._linear(attention.k, c.dim), self._linear(attention.v, c.dim),
            self._linear(attention.o, wide), self._linear(mlp.gate, c.dim) if c.gated else _Linear(),
            self._linear(mlp.up, c.dim), self._linear(mlp.down, c.hidden),
            (c.window[number] or 0) if c.window else 0, 0,
        )  # fmt: skip

    def _linear(self, layer: nn.Module, inputs: int) -> _Linear:
        """A layer or embedding, packed."""
        codes: Tensor | None = getattr(layer, "codes", None)
        steps: Tensor | None = getattr(layer, "steps", None)
        lows: Tensor | None = getattr(layer, "lows", None)
        if codes is None:
            codes = layer.weight.detach().to("cpu", torch.float32)  # type: ignore[operator]
            kind = FLOAT
        elif codes.dtype == torch.int8:
            kind, steps = INT8, steps.float() if steps is not None else None
        else:
            kind = INT4 if lows is None else INT4_LOWS
        if kind == INT8:  # products take whole groups
            inputs += -inputs % GROUP
            codes = F.pad(codes, (0, inputs - codes.shape[1]))
        held = [None if part is None else part.detach().cpu().contiguous() for part in (codes, steps, lows)]
        outputs = len(codes)
        place = self._room(self._lib.packed_bytes(kind, inputs, outputs))
        self._lib.pack(
            kind, inputs, outputs, *(None if part is None else part.data_ptr() for part in held), place
        )
        bias: Tensor | None = getattr(layer, "bias", None)
        made = _Linear(kind, inputs, outputs, bias is not None, place, self._padded(bias, LANES))
        if self._release:
            for part in (*layer.parameters(), *layer.buffers()):
                part.data = part.data.new_empty(0)
        return made

    def _packed(self, rows_OI: Tensor | None) -> int | None:
        """Where float32 numbers stand as products take them: a vector in whole registers, a matrix in panels."""
        if rows_OI is None or rows_OI.ndim == 1:
            return self._padded(rows_OI, LANES)
        rows_OI = rows_OI.contiguous()
        outputs, inputs = rows_OI.shape
        place = self._room(self._lib.packed_bytes(FLOAT, inputs, outputs))
        self._lib.pack(FLOAT, inputs, outputs, rows_OI.data_ptr(), None, None, place)
        return place

    def _room(self, size: int) -> int:
        """Where so many bytes may stand. All matrices share large blocks, for which NumPy asks huge pages: with small
        ones a token spends most of its time on finding 40,000 pages."""
        size += -size % 64
        if size > self._left:
            block = np.empty(max(size, BLOCK) + 64, dtype=np.uint8)
            self._kept.append(block)
            self._next, self._left = block.ctypes.data + -block.ctypes.data % 64, len(block) - 64
        place = self._next
        self._next, self._left = place + size, self._left - size
        return place

    def _norm(self, norm: nn.Module | None) -> _Norm:
        if norm is None:
            return _Norm()
        parts = (getattr(norm, "weight", None), getattr(norm, "bias", None))
        return _Norm(*(self._padded(part, GROUP) for part in parts))

    def _tables(self, stack: Stack, c: StackConfig) -> tuple[int | None, int | None]:
        """What is added at each place, and the angles of each."""
        places = torch.arange(self.positions)
        added: Tensor | None = None
        if stack.positions is not None and isinstance(c.position, Learned):
            added = stack.positions.weight[c.position.offset :][: self.positions].detach().float()
        if isinstance(c.position, Sinusoidal):
            added = sinusoids(places[None], c.dim)[0]
        if stack.types is not None:
            kind = stack.types.weight[0].detach().float()
            added = kind.expand(self.positions, -1) if added is None else added + kind
        angles: int | None = None
        if isinstance(c.position, Rope):
            half = c.head_dim // 2
            cos, sin = (part[0, 0, :, :half] for part in rotary(places[None], c.position, c.head_dim))
            angles = self._hold(torch.cat((cos, sin), dim=1))
        return None if added is None else self._padded(added, GROUP), angles

    def _padded(self, values: Tensor | None, unit: int) -> int | None:
        """Where the float32 values stand, the last dimension brought to whole units with zeros."""
        if values is None:
            return None
        wide = values.detach().to("cpu", torch.float32)
        return self._hold(F.pad(wide, (0, -wide.shape[-1] % unit)))

    def _hold(self, values: Tensor) -> int:
        values = values.contiguous()
        self._kept.append(values)
        return values.data_ptr()


def _bound() -> Any:
    """The library with the types of its functions."""
    lib = library()
    lib.packed_bytes.restype, lib.packed_bytes.argtypes = c_size_t, [c_int32] * 3
    lib.pack.restype, lib.pack.argtypes = None, [c_int32] * 3 + [c_void_p] * 4
    lib.model_new.restype, lib.model_new.argtypes = c_void_p, [c_void_p]
    lib.model_free.restype, lib.model_free.argtypes = None, [c_void_p]
    lib.model_copy.restype, lib.model_copy.argtypes = None, [c_void_p, c_int64, c_int64, c_int32]
    lib.model_adapt.restype, lib.model_adapt.argtypes = c_int32, [c_void_p, c_void_p]
    lib.model_run.restype, lib.model_run.argtypes = None, [c_void_p, c_void_p]
    return lib
