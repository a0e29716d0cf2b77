"""The modules of random networks: each word of ``tests/random_networks.py``, as people write it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from tests.random_networks import Block, Network

VOCABULARY_SIZE = 11
FEATURES = 5
#: The longest input that a network takes.
CONTEXT = 12
#: Length of the example that is traced; what a network is checked on is longer as well.
EXAMPLE = 4


# ----------------------------------------------------------------------------------------------
# norms


def rms(x: Tensor, eps: float = 1e-2) -> Tensor:
    """Without a scale. The eps is large, so that a symmetry that it breaks is seen to be none."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def near_one(*shape: int) -> nn.Parameter:
    """Around one, as a scale is."""
    return nn.Parameter(1 + 0.3 * torch.randn(shape))


class Norm(nn.Module):
    """A norm of the last axis, written by hand."""

    def __init__(self, how: str, width: int) -> None:
        super().__init__()
        self.how, self.shape = how, (width,)
        scale, shift = near_one(width), nn.Parameter(0.3 * torch.randn(width))
        if how in ("F.layer_norm, scale is a buffer", "rms, scale is a buffer"):
            self.register_buffer("weight", scale.detach())
        elif how not in ("F.layer_norm, no affine", "tanh"):
            self.weight = scale
        if how in ("F.layer_norm, shift is a buffer", "rms, shift is a buffer"):
            self.register_buffer("bias", shift.detach())
        elif (
            how.startswith(("F.layer_norm", "layer norm by hand", "rms, shift"))
            and "no affine" not in how
        ):
            self.bias = shift
        if how in ("rms, two scales", "rms, scale twice"):
            self.second = near_one(width)
        if how == "modulated by the input":
            self.modulation = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case (
                "F.layer_norm"
                | "F.layer_norm, scale is a buffer"
                | "F.layer_norm, shift is a buffer"
            ):
                return F.layer_norm(x, self.shape, self.weight, self.bias, 1e-2)
            case "F.layer_norm, weight + 1":
                return F.layer_norm(x, self.shape, self.weight + 1, self.bias, 1e-2)
            case "F.layer_norm, no affine":
                return F.layer_norm(x, self.shape)
            case "F.layer_norm, weight is bias too":
                return F.layer_norm(x, self.shape, self.weight, self.weight)
            case "weight times rms":
                return self.weight * rms(x)
            case "rms, 1 + weight":
                return rms(x) * (1.0 + self.weight)
            case "rms, exp weight":
                return rms(x) * self.weight.exp()
            case "rms, float32, scale after the cast":
                return self.weight * rms(x.float()).to(x.dtype)
            case "rms, float32, scale before the cast":
                return (self.weight.float() * rms(x.float())).type_as(x)
            case "rms, scale twice":
                return rms(rms(x) * self.weight) * self.weight
            case "rms, scale and its square":
                return rms(x) * self.weight + 0.1 * self.weight.square()
            case "rms, shift before scale":
                return (rms(x) + self.bias) * self.weight
            case "rms, shift is a buffer":
                return rms(x) * self.weight + self.bias
            case "rms, scale is a buffer":
                return rms(x) * self.weight
            case "rms, two scales":
                return rms(x) * self.weight * self.second
            case "rms, large eps, then again":
                return rms(rms(x, 0.1) * self.weight, 0.1)
            case "rms of the scaled":
                return rms(x * self.weight)
            case "layer norm by hand":
                centred = x - x.mean(-1, keepdim=True)
                return (
                    self.weight * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt()
                    + self.bias
                )
            case "layer norm by hand, addcmul":
                centred = x - x.mean(-1, keepdim=True)
                return torch.addcmul(
                    self.bias, self.weight, centred / (centred.std(-1, keepdim=True) + 1e-2)
                )
            case "modulated by the input":
                return rms(x) * (
                    self.weight + self.modulation(x.mean(-2, keepdim=True) if x.ndim > 2 else x)
                )
            case "tanh":
                return torch.tanh(x)
        raise AssertionError(self.how)


class OfChannels(nn.Module):
    """A norm that has the channels in its second axis."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.inner(x)
            if x.ndim < 3
            else self.inner(x.transpose(1, 2)).transpose(1, 2).contiguous()
        )


def make_norm(how: str, width: int) -> nn.Module:
    match how:
        case "no norm":
            return nn.Identity()
        case "nn.LayerNorm":
            return nn.LayerNorm(width, eps=1e-2)
        case "nn.RMSNorm":
            return nn.RMSNorm(width, eps=1e-2)
        case "nn.GroupNorm":
            return OfChannels(nn.GroupNorm(2, width))
        case "nn.BatchNorm1d":
            return OfChannels(nn.BatchNorm1d(width))
    return Norm(how, width)


# ----------------------------------------------------------------------------------------------
# linear maps


class Linear(nn.Module):
    """A linear map, written by hand."""

    def __init__(self, how: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.how, self.outputs = how, outputs
        size, scale = (outputs, inputs), inputs**-0.5
        if how in ("x @ weight", "addmm", "batched weight"):
            size = (inputs, outputs)
        if how == "a part of the weight":
            size = (outputs + 2, inputs + 1)
        weight = scale * torch.randn(size)
        if how == "weight is a buffer":
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)
        bias = 0.3 * torch.randn(inputs if how == "bias before the weight" else outputs)
        if how == "bias is a buffer":
            self.register_buffer("bias", bias)
        else:
            self.bias = nn.Parameter(bias)
        if how == "weight times a parameter":
            self.gain = near_one(1)
        if how == "pruned":
            self.register_buffer("mask", (torch.rand(size) > 0.3).float())
        if how == "low rank added":
            self.down, self.up = (
                nn.Parameter(scale * torch.randn(2, inputs)),
                nn.Parameter(torch.randn(outputs, 2)),
            )
        if how == "two maps added":
            self.second = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        match self.how:
            case "F.linear" | "bias is a buffer" | "weight is a buffer":
                return F.linear(x, w, b)
            case "x @ weight.T":
                return x @ w.T + b
            case "x @ weight":
                return x @ w + b
            case "addmm":
                return torch.addmm(b, x.reshape(-1, x.shape[-1]), w).view(
                    *x.shape[:-1], self.outputs
                )
            case "einsum":
                return torch.einsum("...i,oi->...o", x, w) + b
            case "tensordot":
                return torch.tensordot(x, w, dims=([-1], [1])) + b
            case "bias is scaled":
                return F.linear(x, w, 2.0 * b)
            case "bias before the weight":
                return (x - b) @ w.T
            case "pruned":
                return F.linear(x, w * self.mask, b)
            case "weight times a constant":
                return F.linear(x, w * 0.5, b)
            case "weight times a parameter":
                return F.linear(x, w * self.gain, b)
            case "low rank added":
                return F.linear(x, w, b) + x @ self.down.T @ self.up.T
            case "standardised weight":
                return F.linear(
                    x, (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-2), b
                )
            case "cosine":
                return F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1), b)
            case "a part of the weight":
                return F.linear(x, w[: self.outputs, : x.shape[-1]], b)
            case "two maps added":
                return F.linear(x, w, b) + self.second(x)
            case "in two halves":
                half = self.outputs // 2
                return torch.cat(
                    [F.linear(x, w[:half], b[:half]), F.linear(x, w[half:], b[half:])], -1
                )
            case "x and x reversed":
                return F.linear(x, w, b) + F.linear(x.flip(-1), w)
            case "float32":
                return F.linear(x.float(), w.float(), b.float()).to(x.dtype)
            case "rounded weight":
                return F.linear(x, w + ((w * 8).round() / 8 - w).detach(), b)
            case "weight clipped in place":
                with torch.no_grad():
                    w.clamp_(-0.5, 0.5)
                return F.linear(x, w, b)
            case "batched weight":
                flat = x.reshape(1, -1, x.shape[-1])
                return torch.bmm(flat, w[None]).reshape(*x.shape[:-1], self.outputs) + b
        raise AssertionError(self.how)


class Pointwise(nn.Conv1d):
    """A linear map as a convolution of one position."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return super().forward(x[..., None])[..., 0]
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class LinearMaps:
    """Makes the linear maps of a block, all in one spelling."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.biases: dict[int, nn.Parameter] = {}

    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        match self.how:
            case "nn.Linear" | "no bias":
                return nn.Linear(inputs, outputs, bias=self.how == "nn.Linear")
            case "Conv1D":
                return Conv1D(outputs, inputs)
            case "1x1 convolution":
                return Pointwise(inputs, outputs, 1)
            case "weight norm":
                return parametrizations.weight_norm(nn.Linear(inputs, outputs))
            case "spectral norm":
                return parametrizations.spectral_norm(nn.Linear(inputs, outputs))
            case "low rank":
                return nn.Sequential(nn.Linear(inputs, 3, bias=False), nn.Linear(3, outputs))
            case "bias is shared":
                linear = nn.Linear(inputs, outputs)
                linear.bias = self.biases.setdefault(outputs, linear.bias)
                return linear
        return Linear(self.how, inputs, outputs)


# ----------------------------------------------------------------------------------------------
# attention


def rope_tables(length: int, width: int, like: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (length, width / 2); positions up to ``start`` are all the same."""
    frequency = 10.0 ** -(torch.arange(width // 2, device=like.device) * 2 / width)
    angles = (torch.arange(length, device=like.device) - start).clamp(min=0)[:, None] * frequency
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


Memory = dict[str, Any]


class Attention(nn.Module):
    """Attention between positions, written in many ways.

    Args:
        block: its words.
        width, heads: as they say.
        shared: modules of which layers share one.
    """

    def __init__(self, block: Block, width: int, heads: int, shared: nn.ModuleDict) -> None:
        super().__init__()
        self.block, self.heads, self.d = block, heads, width // heads
        linear, how = LinearMaps(block.linear), block.projection
        self.kv_heads = {"grouped queries": max(1, heads // 2), "multi-query": 1}.get(how, heads)
        kv = self.kv_heads * self.d
        if how.startswith("packed"):
            self.qkv = linear(width, 3 * width)
        else:
            if how == "learned queries":
                self.queries = nn.Parameter(torch.randn(CONTEXT, width))
            else:
                self.query = linear(width, width)
            if how == "one map for all keys and values, shared by layers":
                self.key = self.value = self._shared(shared, "both", linear(width, kv))
            elif how == "key map shared by layers":
                self.key, self.value = (
                    self._shared(shared, "key", linear(width, kv)),
                    linear(width, kv),
                )
            elif how == "value map shared by layers":
                self.key, self.value = (
                    linear(width, kv),
                    self._shared(shared, "value", linear(width, kv)),
                )
            else:
                self.key = self.query if how == "queries are keys" else linear(width, kv)
                self.value = self.key if how == "keys are values" else linear(width, kv)
        if how == "a learned key is appended":
            self.extra_key = nn.Parameter(torch.randn(1, self.kv_heads, 1, self.d))
            self.extra_value = nn.Parameter(torch.randn(1, self.kv_heads, 1, self.d))
        if how == "value bias is a buffer":
            self.register_buffer("value_bias", torch.randn(kv))
        if how == "lengthened keys":
            self.longer = linear(self.d, self.d)
        self.output = linear(width, width)
        self._make_position(width)
        match block.qk:
            case "RMSNorm":
                self.query_norm, self.key_norm = nn.RMSNorm(self.d), nn.RMSNorm(self.d)
            case "LayerNorm":
                self.query_norm, self.key_norm = nn.LayerNorm(self.d), nn.LayerNorm(self.d)
            case "RMSNorm over heads":
                self.query_norm, self.key_norm = nn.RMSNorm(width), nn.RMSNorm(kv)
            case "scale of heads":
                self.temperature = near_one(heads, 1, 1)
            case "scale of entries":
                self.temperature = near_one(self.d)
        if block.product in ("sink", "difference of two"):
            self.per_head = nn.Parameter(torch.randn(heads))
        if block.product == "talking heads":
            self.talk = nn.Linear(heads, heads, bias=False)
        match block.after:
            case "gate of entries" | "two outputs":
                self.gate = linear(width, width)
            case "gate of heads" | "gate of heads by view":
                self.gate = linear(width, heads)
            case "scale of heads":
                self.scale = near_one(heads, 1, 1)
            case "scale of entries":
                self.scale = near_one(self.d)
            case "norm of heads":
                self.head_norm = nn.RMSNorm(self.d, eps=1e-2)
            case "values of the first layer, learned share":
                self.share = nn.Parameter(torch.tensor(0.3))
            case "values by position":
                self.scale = near_one(CONTEXT, 1)
            case "half of the heads":
                self.rest = linear(width // 2, width)

    @staticmethod
    def _shared(shared: nn.ModuleDict, name: str, module: nn.Module) -> nn.Module:
        if name not in shared:
            shared[name] = module
        return shared[name]

    @staticmethod
    def _first(memory: Memory, name: str, value: Tensor) -> Tensor:
        """The value of the first layer, if it has as many heads."""
        first = memory.setdefault(name, value)
        return first if first.shape == value.shape else value

    def _make_position(self, width: int) -> None:
        match self.block.position:
            case "learned bias":
                self.bias = nn.Parameter(torch.randn(self.heads, CONTEXT, CONTEXT + 1))
            case "relative to queries" | "relative to keys":
                self.relative = nn.Parameter(torch.randn(CONTEXT + 1, self.d))
            case "rope, learned":
                self.frequency = nn.Parameter(torch.rand(self.d // 2))
            case "learned position in keys" | "learned position in values":
                self.learned = nn.Parameter(torch.randn(CONTEXT, self.d))
            case "mask from the input":
                self.hide = nn.Linear(width, 1)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.d)).transpose(-3, -2)

    def _project(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        how, d = self.block.projection, self.d
        if how.startswith("packed"):
            qkv = self.qkv(x)
            if how == "packed, chunked":
                q, k, v = (self._split(part, self.heads) for part in qkv.chunk(3, -1))
            elif how == "packed, heads first":
                q, k, v = qkv.view(*x.shape[:-1], self.heads, 3 * d).transpose(1, 2).chunk(3, -1)
            else:
                q, k, v = qkv.view(*x.shape[:-1], self.heads, d, 3).permute(4, 0, 2, 1, 3).unbind(0)
            return q, k, v
        q = (
            self.queries[: x.shape[-2]].expand(x.shape)
            if how == "learned queries"
            else self.query(x)
        )
        source = (
            memory.setdefault("first", x)
            if how == "keys and values of the first layer's input"
            else x
        )
        k = self.key(memory["stream"] if how == "keys from the residual stream" else source)
        v = x if how == "values from the input" else self.value(source)
        if how == "value bias is a buffer":
            v = v + self.value_bias
        if self.block.qk == "RMSNorm over heads":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (
            self._split(q, self.heads),
            self._split(k, self.kv_heads),
            self._split(v, self.kv_heads),
        )
        if how == "lengthened keys":
            k = k + self.longer(k.contiguous())
        if how == "a learned key is appended":
            k = torch.cat([k, self.extra_key.expand(len(x), -1, -1, -1)], 2)
            v = torch.cat([v, self.extra_value.expand(len(x), -1, -1, -1)], 2)
        return q, k, v

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        match self.block.qk:
            case "RMSNorm" | "LayerNorm":
                return self.query_norm(q), self.key_norm(k)
            case "unit length":
                return F.normalize(q, dim=-1) * 3, F.normalize(k, dim=-1)
            case "scale of heads" | "scale of entries":
                return q * self.temperature, k
            case "relu":
                return q.relu(), k
            case "clamp":
                return q.clamp(-1, 1), k.clamp(-1, 1)
            case "dropout":
                return F.dropout(q, 0.3, self.training), k
        return q, k

    def _place(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        how, length, d = self.block.position, q.shape[-2], self.d
        cos, sin = rope_tables(length, d, q)
        if k.shape[-2] != length:
            return q, k, v
        match how:
            case "rope, half":
                return rotate_half(q, cos, sin), rotate_half(k, cos, sin), v
            case "rope, interleaved":
                return rotate_interleaved(q, cos, sin), rotate_interleaved(k, cos, sin), v
            case "rope, partial":
                part = d // 4 * 2
                cos, sin = rope_tables(length, part, q)
                q, k = (
                    torch.cat([rotate_half(t[..., :part], cos, sin), t[..., part:]], -1)
                    for t in (q, k)
                )
                return q, k, v
            case "rope, complex":
                turn = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))
                q, k = (
                    torch.view_as_real(
                        torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn
                    ).flatten(-2)
                    for t in (q, k)
                )
                return q, k, v
            case "rope beyond the example":
                if length > EXAMPLE:
                    q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
                return q, k, v
            case "rope on queries only":
                return rotate_half(q, cos, sin), k, v
            case "rope on values":
                return q, k, rotate_half(v, cos, sin)
            case "rope, scaled":
                scale = 1 + 0.1 * torch.arange(length, dtype=q.dtype)[:, None]
                return rotate_half(q, cos, sin) * scale, rotate_half(k, cos, sin) / scale, v
            case "rope, learned":
                angles = torch.arange(length, dtype=q.dtype)[:, None] * self.frequency
                return (
                    rotate_half(q, angles.cos(), angles.sin()),
                    rotate_half(k, angles.cos(), angles.sin()),
                    v,
                )
            case "rope, two-dimensional":
                cos, sin = rope_tables(length, d // 2, q)
                down, across = (
                    (cos[torch.arange(length) // 2], sin[torch.arange(length) // 2]),
                    (cos, sin),
                )
                q, k = (
                    torch.cat([rotate_half(a, *down), rotate_half(b, *across)], -1)
                    for a, b in (q.chunk(2, -1), k.chunk(2, -1))
                )
                return q, k, v
            case "queries scaled by position":
                return q * torch.log(torch.arange(length, dtype=q.dtype) + 2)[:, None], k, v
            case "queries scaled beyond the example":
                scale = (torch.arange(length, dtype=q.dtype) / EXAMPLE).clamp(min=1)[:, None]
                return torch.cat([q[..., :2] * scale, q[..., 2:]], -1), k, v
            case "learned position in keys":
                return q, k + self.learned[:length], v
            case "learned position in values":
                return q, k, v + self.learned[:length]
        return q, k, v

    def _mask(self, q: Tensor, k: Tensor, v: Tensor, memory: Memory) -> Tensor | None:
        """What is added to the scores."""
        n, m = q.shape[-2], k.shape[-2]
        away = torch.arange(n)[:, None] - torch.arange(m)
        unseen = torch.finfo(q.dtype).min
        match self.block.position:
            case "causal":
                return torch.zeros(n, m, dtype=q.dtype).masked_fill(away < 0, unseen)
            case "sliding window":
                return torch.zeros(n, m, dtype=q.dtype).masked_fill((away < 0) | (away > 2), unseen)
            case "sliding window beyond the example":
                return torch.zeros(n, m, dtype=q.dtype).masked_fill(away.abs() > EXAMPLE, unseen)
            case "alibi":
                slopes = 2.0 ** -torch.arange(1, self.heads + 1, dtype=q.dtype)
                return -slopes[:, None, None] * away.abs()
            case "learned bias":
                return self.bias[:, :n, :m]
            case "relative to queries":
                return (q @ self.relative.T)[..., :m].to(q.dtype)
            case "relative to keys":
                return (k.repeat_interleave(self.heads // self.kv_heads, 1) @ self.relative.T)[
                    ..., :n
                ].mT.to(q.dtype)
            case "mask from keys":
                return (
                    k[..., 0]
                    .repeat_interleave(self.heads // self.kv_heads, 1)[:, :, None]
                    .expand(-1, -1, n, -1)
                )
            case "mask from values":
                return (
                    v[..., 0]
                    .repeat_interleave(self.heads // self.kv_heads, 1)[:, :, None]
                    .expand(-1, -1, n, -1)
                )
            case "mask from the input":
                return self.hide(memory["stream"]).transpose(-2, -1)[:, None].expand(-1, -1, n, -1)
        return None

    def _product(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, memory: Memory
    ) -> Tensor:
        how, scale = (
            self.block.product,
            1.0 if self.block.qk == "constant in place of 1/sqrt" else self.d**-0.5,
        )
        if how == "sdpa, enable_gqa":
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        repeats = self.heads // self.kv_heads
        if repeats > 1:
            k, v = (t[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (k, v))
        if how == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        if how == "sdpa, dropout":
            return F.scaled_dot_product_attention(
                q, k, v, mask, 0.2 if self.training else 0.0, scale=scale
            )
        if how in ("sdpa, heads in the batch", "softmax, heads in the batch"):
            q_, k_, v_ = (t.flatten(0, 1) for t in (q, k, v))
            add = None if mask is None else mask.expand(*q.shape[:2], -1, -1).flatten(0, 1)
            if how == "sdpa, heads in the batch":
                out = F.scaled_dot_product_attention(q_, k_, v_, add, scale=scale)
            else:
                scores = torch.bmm(q_, k_.mT) * scale
                out = torch.bmm((scores if add is None else scores + add).softmax(-1), v_)
            return out.unflatten(0, q.shape[:2])
        if how == "sdpa, positions in the batch":  # attention between heads
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        if how == "linear attention":
            q, k = F.elu(q) + 1, F.elu(k) + 1
            return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)
        if how == "softmax by hand, einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
            scores = scores if mask is None else scores + mask
            return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        scores = q @ k.transpose(-2, -1) * scale
        if how == "scores soft-capped":
            scores = 5 * torch.tanh(scores / 5)
        if how == "scores returned":
            memory["returned"].append(scores)
        if how == "talking heads":
            scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        scores = scores if mask is None else scores + mask
        match how:
            case "softmax by hand, float32":
                weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
            case "sigmoid":
                weights = scores.sigmoid()
            case "sink":
                sinks = self.per_head[:, None, None].expand(*scores.shape[:-1], 1)
                weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
            case "difference of two":
                first, second = (
                    part @ other.mT
                    for part, other in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
                )
                weights = first.softmax(-1) - self.per_head[
                    :, None, None
                ].sigmoid() * second.softmax(-1)
            case _:
                weights = scores.softmax(-1)
        return F.dropout(weights, 0.1, self.training) @ v

    def _finish(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor, memory: Memory
    ) -> Tensor:
        """What the heads give, (batch, heads, positions, entries), after what comes before the
        output map.
        """
        repeats = self.heads // self.kv_heads
        match self.block.after:
            case "gate of entries":
                return out * self._split(self.gate(x), self.heads).sigmoid()
            case "gate of heads":
                return out * self.gate(x).transpose(-2, -1)[..., None].sigmoid()
            case "scale of heads" | "scale of entries":
                return out * self.scale
            case "norm of heads":
                return self.head_norm(out)
            case "relu":
                return out.relu()
            case "values added":
                return out + v.repeat_interleave(repeats, 1)[:, :, : out.shape[2]]
            case "values returned":
                memory["returned"].append(v)
            case "keys returned":
                memory["returned"].append(k)
            case "queries returned":
                memory["returned"].append(q)
            case "cache":
                memory["returned"].append((k, v))
            case "heads returned":
                memory["returned"].append(out)
            case "dropout":
                return F.dropout(out, 0.2, self.training)
            case "loss of the keys":
                self.auxiliary_loss = k.square().mean() + k[..., 0].mean()
            case "values by position":
                return out * self.scale[: out.shape[-2]]
            case "heads permuted":
                return out.flip(1)
            case "heads averaged":
                return out + out.mean(1, keepdim=True)
        return out

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        q, k, v = self._project(x, memory)
        q, k = self._normalise(q, k) if self.block.qk != "RMSNorm over heads" else (q, k)
        match self.block.after:
            case "values of the first layer":
                v = v + self._first(memory, "values", v)
            case "values of the first layer, learned share":
                v = torch.lerp(v, self._first(memory, "values", v), self.share)
            case "keys of the first layer":
                k = self._first(memory, "keys", k)
            case "values clamped":
                v = v.clamp(-0.5, 0.5)
        q, k, v = self._place(q, k, v)
        out = self._product(q, k, v, self._mask(q, k, v, memory), memory)
        out = self._finish(out, q, k, v, x, memory)
        if self.block.after == "gate of heads by view":
            out = out * self.gate(x).view(*x.shape[:-1], self.heads, 1).transpose(1, 2).sigmoid()
            return self.output(out.transpose(1, 2).contiguous().view(x.shape))
        flat = out.transpose(1, 2).reshape(x.shape)
        if self.block.after == "two outputs":
            return self.output(flat) + self.gate(flat)
        if self.block.after == "half of the heads":
            return self.output(flat) + self.rest(flat[..., : x.shape[-1] // 2].contiguous())
        return self.output(flat)


class OtherMixer(nn.Module):
    """Mixes positions by what torch has, or otherwise than by attention."""

    def __init__(self, how: str, width: int, heads: int) -> None:
        super().__init__()
        self.how = how
        options = {"batch_first": True, "dropout": 0.1}
        if how.startswith("nn.MultiheadAttention"):
            extra = {name: True for name in ("add_bias_kv", "add_zero_attn") if name in how}
            self.inner: nn.Module = nn.MultiheadAttention(width, heads, **options, **extra)
        elif how.startswith("nn.TransformerEncoderLayer"):
            first = how.endswith("norm first")
            self.inner = nn.TransformerEncoderLayer(
                width, heads, 2 * width, norm_first=first, **options
            )
        elif how == "convolution":
            self.inner = nn.Conv1d(width, width, 3, padding=1)
        elif how == "nn.GRU":
            self.inner = nn.GRU(width, width, batch_first=True)
        else:
            self.inner = nn.Linear(width, width)
            self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        match self.how:
            case "nn.MultiheadAttention, weights returned":
                out, weights = self.inner(x, x, x, average_attn_weights=False)
                memory["returned"].append(weights)
                return out
            case "nn.MultiheadAttention, padding mask":
                mask = torch.arange(x.shape[1]).expand(x.shape[:2]) > 2
                return self.inner(x, x, x, key_padding_mask=mask, need_weights=False)[0]
            case "convolution":
                return self.inner(x.transpose(1, 2)).transpose(1, 2)
            case "mean of positions":
                return self.output(self.inner(x).mean(1, keepdim=True).expand(x.shape))
            case "cumulative gate":
                return self.output(self.inner(x).cumsum(1) * x.sigmoid())
            case "nn.GRU":
                return self.inner(x)[0]
        if self.how.startswith("nn.TransformerEncoderLayer"):
            return self.inner(x)
        return self.inner(x, x, x, need_weights=False)[0]


# ----------------------------------------------------------------------------------------------
# MLPs


class Activation(nn.Module):
    """An elementwise function, or one that is not."""

    def __init__(self, how: str, units: int) -> None:
        super().__init__()
        self.how = how
        if how == "prelu":
            self.inner: nn.Module = nn.PReLU()
        elif how == "prelu of units":
            self.slope = nn.Parameter(torch.rand(units))
        elif how == "learned relu":
            self.slope = near_one(units)
        elif how == "rrelu":
            self.inner = nn.RReLU()

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "relu":
                return F.relu(x)
            case "relu squared":
                return F.relu(x).square()
            case "leaky relu":
                return F.leaky_relu(x, 0.2)
            case "gelu":
                return F.gelu(x)
            case "silu":
                return F.silu(x)
            case "relu6":
                return F.relu6(x)
            case "relu in place":
                return x.relu_()
            case "clamp_min":
                return x.clamp(min=0)
            case "maximum":
                return torch.maximum(x, torch.zeros_like(x))
            case "where":
                return torch.where(x > 0, x, 0.3 * x)
            case "abs":
                return x.abs()
            case "square":
                return x * x
            case "cube of relu":
                return F.relu(x) ** 3
            case "prelu" | "rrelu":
                return self.inner(x)
            case "prelu of units":
                return F.relu(x) - self.slope * F.relu(-x)
            case "learned relu":
                return F.relu(x * self.slope) ** 2
            case "celu":
                return F.celu(x)
            case "sqrt of relu":
                return torch.sqrt(F.relu(x) + 1e-3)
            case "threshold":
                return F.threshold(x, 0.1, 0.0)
            case "shifted relu":
                return F.relu(x - 0.5)
            case "relu of the negative":
                return -F.relu(-x)
            case "crelu":
                return F.relu(x) + 0.5 * F.relu(-x) ** 2
            case "maxout":
                return torch.maximum(x, x.roll(1, -1))
            case "softmax":
                return x.softmax(-1)
            case "normalised":
                return F.relu(x) / (F.relu(x).sum(-1, keepdim=True) + 0.1)
            case "hardshrink":
                return F.hardshrink(x, 0.2)
            case "identity":
                return x
            case "sign":
                return x * torch.sign(x.detach() - 0.1)
            case "glu":
                return F.glu(torch.cat([x, x.flip(-1)], -1))
        raise AssertionError(self.how)


class Between(nn.Module):
    """What lies between an activation and the map that reads it."""

    def __init__(self, how: str, units: int) -> None:
        super().__init__()
        self.how = how
        if how in ("nn.LayerNorm", "nn.BatchNorm1d"):
            self.norm = make_norm(how, units)
        elif how in ("parameter added", "parameter times"):
            self.parameter = near_one(units)
        elif how == "read by a probe in training":
            self.probe = nn.Linear(units, 1)
        elif how == "convolution over positions":
            self.convolution = nn.Conv1d(units, units, 3, padding=1, groups=units)

    def forward(self, h: Tensor, memory: Memory) -> Tensor:
        match self.how:
            case "dropout":
                return F.dropout(h, 0.3, self.training)
            case "alpha dropout":
                return F.alpha_dropout(h, 0.3, self.training)
            case "clamp":
                return h.clamp(max=0.5)
            case "parameter added":
                return h + self.parameter
            case "parameter times":
                return h * self.parameter
            case "constant added":
                return h + 0.1
            case "constant times":
                return h * 1.5 / 2
            case "nn.LayerNorm" | "nn.BatchNorm1d":
                return self.norm(h)
            case "rms without scale":
                return rms(h)
            case "noise in training":
                return h + 0.1 * torch.randn_like(h) if self.training else h
            case "mean kept as a loss":
                self.auxiliary_loss = h.mean()
            case "kept as an attribute":
                self.hidden = h
            case "returned":
                memory["returned"].append(h)
            case "detached":
                return h + 0.1 * h.detach().sum(-1, keepdim=True)
            case "read by a probe in training":
                if self.training:
                    self.auxiliary_loss = self.probe(h).square().mean()
            case "shifted by a position":
                return torch.cat(
                    [h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :].roll(1, 0)], -1
                )
            case "convolution over positions":
                return (
                    self.convolution(h.transpose(1, 2)).transpose(1, 2).contiguous()
                    if h.ndim > 2
                    else h
                )
            case "sum of units":
                return h + h.sum(-1, keepdim=True)
            case "checkpointed":
                return torch.utils.checkpoint.checkpoint(
                    torch.mul, h, h.sigmoid(), use_reentrant=False
                )
        return h


class MLP(nn.Module):
    """A feed-forward part, plain or gated, written in many ways."""

    def __init__(self, block: Block, width: int, shared: nn.ModuleDict) -> None:
        super().__init__()
        linear, how = LinearMaps(block.linear), block.mlp
        self.how, units = how, 2 * width + 2
        if how in ("residual within", "up and down are one"):
            units = width
        self.units = units
        self.activation = Activation(block.activation, units)
        self.between = Between(block.between, units)
        if how.startswith("gated, packed"):
            self.up = linear(width, 2 * units)
        elif how == "shared with another block":
            if "up" not in shared:
                shared["up"] = linear(width, units)
            self.up = shared["up"]
        elif not how.startswith("experts"):
            self.up = linear(width, units)
        if (
            how.startswith(("gated", "gate")) and "packed" not in how
        ) or how == "value used elsewhere":
            self.gate = linear(width, units)
        if how in ("experts", "experts, best two", "experts by index"):
            self.router = nn.Linear(width, 3)
            self.ups = nn.ModuleList(linear(width, units) for _ in range(3))
            self.downs = nn.ModuleList(linear(units, width) for _ in range(3))
        elif how == "experts, stacked":
            self.router = nn.Linear(width, 3)
            self.up_weights = nn.Parameter(torch.randn(3, units, width) * width**-0.5)
            self.down_weights = nn.Parameter(torch.randn(3, width, units) * units**-0.5)
        elif how == "down is up transposed":
            self.up = nn.Linear(width, units)
        elif how == "up and down are one":
            pass
        else:
            self.down = linear(units, width)
        match how:
            case "gate used elsewhere" | "value used elsewhere" | "two readers":
                self.second = linear(units, width)
            case "three maps":
                self.middle = linear(units, units)
            case "halves to two maps":
                self.down, self.second = (
                    linear(units // 2, width),
                    linear(units - units // 2, width),
                )
            case "bottleneck":
                self.narrow, self.wide = nn.Linear(width, 3, bias=False), nn.Linear(3, width)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        act = self.activation
        match self.how:
            case "activation after" | "activation after, no residual":
                return act(self.down(self.between(act(self.up(x)), memory)))
            case "up and down" | "shared with another block":
                return self.down(self.between(act(self.up(x)), memory))
            case "gated":
                return self.down(self.between(act(self.gate(x)) * self.up(x), memory))
            case "gated, packed":
                gate, value = self.up(x).chunk(2, -1)
                return self.down(self.between(act(gate) * value, memory))
            case "gated, packed, interleaved":
                both = self.up(x)
                return self.down(self.between(act(both[..., ::2]) * both[..., 1::2], memory))
            case "gated, product of two maps":
                return self.down(self.between(self.gate(x) * self.up(x), memory))
            case "gate used elsewhere":
                gate = self.gate(x)
                return self.down(self.between(act(gate) * self.up(x), memory)) + self.second(gate)
            case "value used elsewhere":
                value = self.up(x)
                return self.down(self.between(act(self.gate(x)) * value, memory)) + self.second(
                    value.tanh()
                )
            case "gate in training only":
                h = act(self.up(x))
                return self.down(
                    self.between(h * self.gate(x).tanh() + 1 if self.training else h, memory)
                )
            case "up twice":
                return self.down(self.between(act(self.up(x)) + self.up(x.flip(-1)).tanh(), memory))
            case "three maps":
                return self.down(self.between(act(self.middle(act(self.up(x)))), memory))
            case "residual within":
                return self.down(self.between(x + act(self.up(x)), memory))
            case "down is up transposed":
                return F.linear(self.between(act(self.up(x)), memory), self.up.weight.T)
            case "up and down are one":
                return self.up(self.between(act(self.up(x)), memory))
            case "two readers":
                h = self.between(act(self.up(x)), memory)
                return self.down(h) + self.second(h)
            case "halves to two maps":
                first, second = self.between(act(self.up(x)), memory).split(
                    [self.units // 2, self.units - self.units // 2], -1
                )
                return self.down(first.contiguous()) + self.second(second.contiguous())
            case "a half untouched":
                first, second = self.up(x).chunk(2, -1)
                return self.down(self.between(torch.cat([act(first), second], -1), memory))
            case "bottleneck":
                return self.down(self.between(act(self.up(self.wide(self.narrow(x)))), memory))
            case "experts" | "experts, best two" | "experts by index":
                return self._experts(x, memory)
            case "experts, stacked":
                share = self.router(x).softmax(-1)
                h = act(torch.einsum("...i,eui->...eu", x, self.up_weights))
                each = torch.einsum("...eu,eou->...eo", self.between(h, memory), self.down_weights)
                return (each * share[..., None]).sum(-2)
        raise AssertionError(self.how)

    def _experts(self, x: Tensor, memory: Memory) -> Tensor:
        share = self.router(x).softmax(-1)
        self.auxiliary_loss = (share.flatten(0, -2).mean(0) ** 2).sum()
        if self.how == "experts, best two":
            best, _ = share.topk(2, -1)
            share = torch.where(share >= best[..., 1:], share, torch.zeros_like(share))
        out = torch.zeros_like(x)
        for i, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            if self.how == "experts by index":
                chosen = share.argmax(-1) == i
                out[chosen] = down(self.between(self.activation(up(x[chosen])), memory))
            else:
                out = out + share[..., i : i + 1] * down(
                    self.between(self.activation(up(x)), memory)
                )
        return out


# ----------------------------------------------------------------------------------------------
# blocks


class Sublayer(nn.Module):
    """A norm, what reads it, and the residual connection around both."""

    def __init__(self, block: Block, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.norm = make_norm(block.norm, width)
        self.inner = inner
        match block.norm_use:
            case "times a parameter" | "plus a parameter":
                self.parameter = near_one(width)
            case "times a buffer":
                self.register_buffer("factor", near_one(width).detach())
            case "plus positions":
                self.positions = nn.Parameter(torch.randn(CONTEXT, width))
            case "gates the block" | "read in training only":
                self.gate = nn.Linear(width, width)
            case "concatenated with the input":
                self.join = nn.Linear(2 * width, width)
        if block.residual == "scaled by a parameter":
            self.scale = near_one(1)
        elif block.residual == "scaled by entries":
            self.scale = near_one(width)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        memory["stream"] = x
        if self.block.norm_use == "after":
            return self.norm(self._add(x, self.inner(x, memory)))
        normed = self.norm(x)
        match self.block.norm_use:
            case "returned":
                memory["returned"].append(normed)
            case "residual of the norm":
                x = normed
            case "kept as an attribute":
                self.normed = normed
            case "its mean kept as a loss":
                self.auxiliary_loss = normed.mean()
            case "its scale is a loss":
                self.auxiliary_loss = torch.stack(
                    [p.square().mean() for p in self.norm.parameters()] or [x.mean()]
                ).sum()
            case "read by a later block":
                normed = normed + memory.setdefault("normed", torch.zeros_like(normed))
                memory["normed"] = normed
            case "dropout after":
                normed = F.dropout(normed, 0.2, self.training)
            case "times a constant":
                normed = normed * 0.7
            case "times a parameter":
                normed = normed * self.parameter
            case "times a buffer":
                normed = normed * self.factor
            case "plus a parameter":
                normed = normed + self.parameter
            case "plus positions":
                normed = normed + (
                    self.positions[: x.shape[1]] if x.ndim > 2 else self.positions[0]
                )
            case "to float32":
                normed = normed.float().to(x.dtype)
            case "rolled":
                normed = normed.roll(1, -1)
            case "concatenated with the input":
                normed = self.join(torch.cat([normed, x], -1))
            case "reshaped into more positions" if x.ndim > 2:
                normed = normed.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        out = self.inner(normed, memory)
        match self.block.norm_use:
            case "gates the block":
                out = out * self.gate(normed).sigmoid()
            case "added to the block":
                out = out + normed.tanh()
            case "read in training only" if self.training:
                out = out + self.gate(normed.tanh())
        return self._add(x, out)

    def _add(self, x: Tensor, out: Tensor) -> Tensor:
        if self.block.mlp == "activation after, no residual":
            return out
        match self.block.residual:
            case "none":
                return out
            case "scaled by a parameter" | "scaled by entries":
                return x + self.scale * out
            case "stochastic depth":
                if self.training:
                    out = out * (torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype) > 0.3) / 0.7
                return x + out
            case "divided by sqrt 2":
                return (x + out) / math.sqrt(2)
        return x + out


class BlockModule(nn.Module):
    """A mixer and an MLP, one after the other or side by side behind one norm."""

    def __init__(self, block: Block, network: Network, shared: nn.ModuleDict) -> None:
        super().__init__()
        width, heads = network.width, network.heads
        parts: list[nn.Module] = []
        if block.mixer == "attention":
            parts.append(Attention(block, width, heads, shared))
        elif block.mixer != "none":
            parts.append(OtherMixer(block.mixer, width, heads))
        if block.mlp != "none":
            parts.append(MLP(block, width, shared))
        if block.residual == "parallel":
            parts = [Parallel(parts)] if parts else []
        self.sublayers = nn.ModuleList(Sublayer(block, width, part) for part in parts)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        for sublayer in self.sublayers:
            x = sublayer(x, memory)
        return x


class Parallel(nn.Module):
    """The sum of what several parts make of one input."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return sum((part(x, memory) for part in self.parts), torch.zeros_like(x))


# ---------------------------------------------------------------------------------------------- the
# network


class Embed(nn.Module):
    """From the inputs to the residual stream."""

    def __init__(self, how: str, width: int) -> None:
        super().__init__()
        self.how, self.width = how, width
        match how:
            case "floats" | "vectors" | "a list":
                self.map = nn.Linear(FEATURES, width)
            case "one-hot":
                self.map = nn.Linear(VOCABULARY_SIZE, width)
            case "images":
                self.patches = nn.Conv2d(2, width, 2, stride=2)
                self.first = nn.Parameter(torch.randn(1, 1, width))
            case "embeddings out of a parameter":
                self.table = nn.Parameter(torch.randn(VOCABULARY_SIZE, width))
            case "tokens, max_norm":
                self.table = nn.Embedding(VOCABULARY_SIZE, width, max_norm=1.0)
            case "tokens, padding":
                self.table = nn.Embedding(VOCABULARY_SIZE, width, padding_idx=1)
            case _:
                self.table = nn.Embedding(VOCABULARY_SIZE, width)
        match how:
            case "tokens and positions":
                self.positions = nn.Parameter(torch.randn(CONTEXT, width))
            case "tokens, two tables":
                self.second = nn.Embedding(VOCABULARY_SIZE, width)
            case "tokens, normalised":
                self.norm = nn.LayerNorm(width)
            case "tokens and floats" | "keyword arguments":
                self.map = nn.Linear(FEATURES, width)

    def forward(self, x: Any, other: Tensor | None) -> Tensor:
        match self.how:
            case "floats" | "vectors":
                return self.map(x)
            case "a list":
                return self.map(x[0]) + self.map(x[1]).tanh()
            case "one-hot":
                return self.map(F.one_hot(x, VOCABULARY_SIZE).to(self.map.weight.dtype))
            case "images":
                patches = self.patches(x).flatten(2).transpose(1, 2)
                return torch.cat([self.first.expand(len(x), -1, -1), patches], 1)
            case "embeddings out of a parameter":
                return self.table[x]
            case "a mapping":
                return self.table(x["tokens"])
            case "tokens and positions":
                return self.table(x) + self.positions[: x.shape[1]]
            case "tokens, two tables":
                return self.table(x) + self.second(x.roll(1, 1))
            case "tokens, scaled":
                return self.table(x) * math.sqrt(self.width)
            case "tokens, normalised":
                return self.norm(self.table(x))
            case "tokens and mask":
                assert other is not None
                return self.table(x) * other[..., None]
            case "tokens and floats" | "keyword arguments":
                assert other is not None
                return self.table(x) + self.map(other)
        return self.table(x)


class Config:
    """What a model says of its loss, as those of transformers do."""

    problem_type = "multi_label_classification"


class Head(nn.Module):
    """From the residual stream to the outputs, the first of which are the logits."""

    def __init__(self, network: Network, embed: Embed) -> None:
        super().__init__()
        width, how = network.width, network.head
        self.how, self.norm_use = how, network.norm_use
        self.norm = nn.Identity() if how == "nothing else" else make_norm(network.norm, width)
        outputs = {"one output": 1, "regression": 3, "several labels": 3}.get(how, VOCABULARY_SIZE)
        if how in ("x @ weight", "bias is a buffer"):
            self.linear: nn.Module = Linear(how, width, outputs)
        elif how not in ("features", "nothing else"):
            self.linear = nn.Linear(
                width, outputs, bias=how not in ("no bias", "tied", "similarity")
            )
        if how == "tied":
            table = getattr(embed, "table", None)
            if isinstance(table, nn.Embedding):
                self.linear.weight = table.weight
            elif isinstance(table, nn.Parameter):
                self.linear.weight = table
        elif how == "weight norm":
            self.linear = parametrizations.weight_norm(self.linear)
        if (
            how in ("two towers", "two heads", "two heads, joined", "mixture of softmaxes")
            or "auxiliary" in how
        ):
            self.second = nn.Linear(width, outputs)
        if how == "bias added after":
            self.bias = nn.Parameter(torch.randn(outputs))
        if how == "bias shared with another":
            self.second = nn.Linear(width, outputs)
            self.second.bias = self.linear.bias
        if how in ("temperature", "similarity"):
            self.temperature = nn.Parameter(torch.tensor(0.7))
        if network.norm_use == "times a parameter":
            self.parameter = near_one(width)
        elif network.norm_use == "read in training only":
            self.probe = nn.Linear(width, 2)

    def _normed(self, x: Tensor, memory: Memory) -> Tensor:
        normed = self.norm(x)
        match self.norm_use:
            case "returned":
                memory["returned"].append(normed)
            case "times a parameter":
                return normed * self.parameter
            case "its mean kept as a loss":
                self.norm_loss = normed.mean()
            case "read in training only" if self.training:
                memory["returned"].append(self.probe(normed.square()))
            case "dropout after":
                return F.dropout(normed, 0.2, self.training)
        return normed

    def forward(self, x: Tensor, memory: Memory) -> Any:
        normed = self._normed(x, memory)
        extra = tuple(memory["returned"])
        if self.how in ("features", "nothing else"):
            return (normed, *extra) if extra else normed
        if self.how == "linear without norm":
            normed = x
        elif self.how == "mean before the head":
            normed = normed.mean(1) if normed.ndim > 2 else normed
        elif self.how == "last position":
            normed = normed[:, -1] if normed.ndim > 2 else normed
        logits = self.linear(normed)
        match self.how:
            case "soft-capped":
                logits = 2 * torch.tanh(logits / 2)
            case "scaled":
                logits = logits * 0.3
            case "temperature":
                logits = logits * self.temperature.exp()
            case "log_softmax":
                logits = logits.log_softmax(-1)
            case "classes first":
                logits = logits.transpose(1, -1)
            case "masked":
                logits = logits.masked_fill(torch.arange(VOCABULARY_SIZE) < 2, -1e4)
            case "mean after the head":
                logits = logits.mean(1) if logits.ndim > 2 else logits
            case "two towers":
                return (logits, self.second(normed.flip(0)), *extra)
            case "similarity":
                one, other = F.normalize(normed, dim=-1), F.normalize(self.linear.weight, dim=-1)
                logits = one @ other.T * self.temperature.exp()
            case "a mapping":
                return {"logits": logits, **({"extra": extra} if extra else {})}
            case "ModelOutput":
                return CausalLMOutput(logits=logits, hidden_states=extra or None)
            case "hidden states too":
                return BaseModelOutput(
                    last_hidden_state=logits, hidden_states=(x, normed), attentions=extra or None
                )
            case "logits twice":
                return (logits, logits.clone(), *extra)
            case "largest logit too":
                return (logits, logits.amax(-1), *extra)
            case "probabilities too":
                return (logits, logits.softmax(-1), logits.argmax(-1), *extra)
            case "z-loss":
                self.auxiliary_loss = logits.logsumexp(-1).square().mean()
            case "two heads" | "auxiliary head":
                return (logits, self.second(normed), *extra)
            case "two heads, joined":
                logits = torch.cat([logits, self.second(normed)], -1)
            case "bias shared with another":
                return (logits, self.second(normed.tanh()), *extra)
            case "head used twice":
                return (logits, self.linear(x).tanh(), *extra)
            case "auxiliary head in training" if self.training:
                return (logits, self.second(normed.tanh()), *extra)
            case "auxiliary head kept as a loss":
                self.auxiliary_loss = self.second(normed).logsumexp(-1).mean()
            case "labels":
                labels = torch.arange(logits.shape[:-1].numel()) % VOCABULARY_SIZE
                return (F.cross_entropy(logits.flatten(0, -2), labels), logits, *extra)
            case "weight decay kept as a loss":
                self.auxiliary_loss = self.linear.weight.square().sum()
            case "predictions first":
                return (logits.argmax(-1), logits, *extra)
            case "bias added after":
                logits = logits + self.bias
            case "in groups":
                logits = torch.cat([logits, logits[..., :1]], -1).unflatten(-1, (2, -1))
            case "mixture of softmaxes":
                logits = (0.5 * (logits.softmax(-1) + self.second(normed).softmax(-1))).log()
        return (logits, *extra) if extra else logits


class NetworkModule(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.wrapper = network.wrapper
        self.embed = Embed(network.inputs, network.width)
        shared = nn.ModuleDict()
        self.blocks = nn.ModuleList(BlockModule(block, network, shared) for block in network.blocks)
        self.head = Head(network, self.embed)
        if network.head == "several labels":
            self.config = Config()
        width = network.width
        match network.wrapper:
            case "complex buffer":
                self.register_buffer("phase", torch.polar(torch.ones(width), torch.rand(width)))
            case "complex parameter":
                self.phase = nn.Parameter(torch.polar(torch.ones(width), torch.rand(width)))
            case "integer buffer":
                self.register_buffer("permutation", torch.randperm(width))
            case "unused parameter":
                self.unused = nn.Parameter(torch.randn(width))
            case "parameter in a ParameterList":
                self.scales = nn.ParameterList([near_one(width), near_one(width)])
            case "condition on length":
                self.late = nn.Linear(width, width)
            case "state in a buffer":
                self.register_buffer("state", torch.zeros(width))

    def forward(self, x: Any, other: Tensor | None = None) -> Any:
        memory: Memory = {"returned": []}
        h = self.embed(x, other)
        match self.wrapper:
            case "complex buffer" | "complex parameter":
                h = (h * self.phase).real + (h * self.phase).imag
            case "integer buffer":
                h = h[..., self.permutation]
            case "parameter in a ParameterList":
                h = h * self.scales[0] * self.scales[1]
            case "condition on values":
                h = -h if h.sum() > 0 else h
            case "condition on length" if h.ndim > 2 and h.shape[1] > EXAMPLE:
                h = h + self.late(self.head.norm(h))
            case "state in a buffer":
                self.state.mul_(0.9).add_(h.detach().mean(tuple(range(h.ndim - 1))))
                h = h + self.state
        for _ in range(2 if self.wrapper == "calls itself" else 1):
            for i, block in enumerate(self.blocks):
                if self.wrapper == "no_grad part" and i == 0:
                    with torch.no_grad():
                        h = block(h, memory)
                elif self.wrapper == "autocast":
                    with torch.autocast("cpu", torch.bfloat16):
                        h = block(h, memory)
                else:
                    h = block(h, memory)
        return self.head(h, memory)


# ----------------------------------------------------------------------------------------------
# wrappers


def on_first(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Change the first output alone."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        first = next(iter(output))
        changed[first] = change(output[first])
        return changed
    return (change(output[0]), *output[1:])


class Wrapper(nn.Module):
    """A module around another; what it does beside calling it, ``how`` says."""

    def __init__(self, inner: nn.Module, how: str, outputs: int = 0) -> None:
        super().__init__()
        self.how = how
        if how == "called _orig_mod":
            self._orig_mod = inner
        else:
            self.module = inner
        if how == "called module, with a head":
            self.head = nn.Linear(outputs, outputs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.how == "called _orig_mod":
            return on_first(torch.tanh, self._orig_mod(*args, **kwargs))
        output = self.module(*args, **kwargs)
        if self.how == "called module, with a head":
            return on_first(lambda first: self.head(F.relu(first)), output)
        if self.how == "called module, with a penalty":
            self.auxiliary_loss = torch.stack(
                [p.abs().square().sum() for p in self.module.parameters()]
            ).sum()
        return output


class Several(nn.Module):
    """Networks that are added up, or one that is used in another way."""

    def __init__(self, how: str, *inner: nn.Module) -> None:
        super().__init__()
        self.how = how
        self.inner: Any = list(inner) if how == "in a list" else nn.ModuleList(inner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = self.inner[0](*args, **kwargs)
        if self.how == "in a list":
            return first
        other = self.inner[-1](*args, **kwargs)
        if self.how == "applied twice":
            return on_first(lambda logits: logits + 0.5 * leading(other).flip(0), first)
        return on_first(lambda logits: logits + leading(other), first)


def leading(output: Any) -> Tensor:
    """The first output."""
    if isinstance(output, Tensor):
        return output
    return next(iter(output.values())) if isinstance(output, Mapping) else output[0]


def wrapped(model: nn.Module, network: Network) -> nn.Module:
    outputs = {"one output": 1, "regression": 3, "several labels": 3}.get(
        network.head, VOCABULARY_SIZE
    )
    match network.wrapper:
        case (
            "called module"
            | "called _orig_mod"
            | "called module, with a penalty"
            | "called module, with a head"
        ):
            outputs = network.width if network.head in ("features", "nothing else") else outputs
            outputs *= 2 if network.head == "two heads, joined" else 1
            if network.head in ("labels", "classes first") and network.wrapper.endswith("head"):
                return Wrapper(model, "called module")
            return Wrapper(model, network.wrapper, outputs)
        case "nn.DataParallel":
            return nn.DataParallel(model)
        case "nn.Sequential" if network.inputs not in (
            "tokens and mask",
            "tokens and floats",
            "keyword arguments",
        ):
            return nn.Sequential(model)
        case "two networks added":
            return Several(network.wrapper, model, NetworkModule(network))
        case "applied twice" | "in a list":
            return Several(network.wrapper, model)
        case "hook that scales":
            model.register_forward_hook(
                lambda _module, _args, output: on_first(lambda first: 2 * first + 1, output)
            )
        case "hook that adds the norm":
            kept: list[Tensor] = []
            model.head.norm.register_forward_hook(
                lambda _module, _args, output: kept.append(output.mean())
            )
            model.register_forward_hook(
                lambda _module, _args, output: on_first(lambda y: y * kept.pop().tanh(), output)
            )
        case "hook before" if hasattr(model.head, "linear"):
            model.head.linear.register_forward_pre_hook(
                lambda _module, args: (args[0] + args[0].tanh(),)
            )
        case "no parameters":
            for module in list(model.modules()):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    delattr(module, name)
                    module.register_buffer(name, parameter.detach())
        case "all frozen":
            model.requires_grad_(False)
    return model


# ----------------------------------------------------------------------------------------------
# surgeries


class AddHalf(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5


class Masked(nn.Module):
    """A parametrization, as pruning is one."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.arange(weight.numel()).view(weight.shape) % 3 > 0)


def operate(model: nn.Module, word: str, index: int) -> None:
    """Change a network that has been made; does nothing where there is nothing to change."""
    owned = [
        (module, name, parameter)
        for path, module in model.named_modules()
        if "parametrizations" not in path and not isinstance(module, nn.MultiheadAttention | nn.GRU)
        for name, parameter in module.named_parameters(recurse=False)
    ]
    matrices = [
        (module, name)
        for module, name, parameter in owned
        if parameter.ndim == 2 and name == "weight"
    ]
    parts = [
        (module, name)
        for module in model.modules()
        if isinstance(module, Sublayer | NetworkModule | Head)
        for name in ("norm", "inner", "head", "embed")
        if isinstance(getattr(module, name, None), nn.Module)
    ]
    inner = [
        getattr(module, name)
        for module, name in parts
        if not isinstance(getattr(module, name), Head)
    ]
    callable_parts = [*inner, *(module for module, _ in matrices)]
    if not owned or not inner:
        return
    module, name, parameter = owned[index % len(owned)]
    match word:
        case "tied":
            pairs = [
                (a, b)
                for i, a in enumerate(owned)
                for b in owned[i + 1 :]
                if a[2].shape == b[2].shape and a[2] is not b[2]
            ]
            if pairs:
                (_, _, shared), (other, other_name, _) = pairs[index * 7 % len(pairs)]
                setattr(other, other_name, shared)
        case "frozen":
            parameter.requires_grad_(False)
        case "is a buffer":
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
        case "parametrized by + 1/2":
            parametrize.register_parametrization(module, name, AddHalf())
        case "parametrized by a mask":
            parametrize.register_parametrization(module, name, Masked())
        case "weight norm" if matrices:
            parametrizations.weight_norm(*matrices[index % len(matrices)])
        case "returned by a hook":
            kept: list[Any] = []
            callable_parts[index % len(callable_parts)].register_forward_hook(
                lambda _m, _a, output: kept.append(output)
            )

            def give(_module: nn.Module, _args: Any, output: Any) -> Any:
                given = [kept.pop() for _ in range(len(kept))]
                if isinstance(output, tuple | Tensor):
                    return (*((output,) if isinstance(output, Tensor) else output), *given)
                return {**output, "kept": given}

            model.register_forward_hook(give)
        case "scaled by a hook":
            callable_parts[index % len(callable_parts)].register_forward_hook(
                lambda _m, _a, output: 2 * output
            )
        case "wrapped as module":
            owner, attribute = parts[index % len(parts)]
            if not isinstance(getattr(owner, attribute), Embed | Head) and not isinstance(
                owner, Head
            ):
                setattr(owner, attribute, Wrapper(getattr(owner, attribute), "called module"))
        case "registered twice":
            model.again = inner[index % len(inner)]
        case "its square is a loss":

            def penalise(owner: nn.Module, _args: Any, _output: Any) -> None:
                owner.penalty = getattr(module, name).square().mean()

            model.register_forward_hook(penalise)
        case "its square is an output":
            model.register_forward_hook(
                lambda _m, _a, output: (
                    (
                        *((output,) if isinstance(output, Tensor) else output),
                        getattr(module, name).square().mean(),
                    )
                    if isinstance(output, Tensor | tuple)
                    else {**output, "penalty": getattr(module, name).square().mean()}
                )
            )
        case "one norm for two":
            sublayers = [each for each in model.modules() if isinstance(each, Sublayer)]
            if sublayers:
                sublayers[-1].norm = sublayers[0].norm
        case "copied to a buffer":
            average = f"average_{len(list(model.buffers()))}"
            model.register_buffer(average, parameter.detach().clone())

            def follow(owner: nn.Module, _args: Any, _output: Any) -> None:
                if owner.training:
                    getattr(owner, average).lerp_(getattr(module, name).detach(), 0.1)

            model.register_forward_hook(follow)


@torch.no_grad()
def begin(model: nn.Module, how: str) -> None:
    """Put parameters at starting values that people use."""
    for name, parameter in model.named_parameters():
        vector, last = parameter.ndim < 2, any(word in name for word in ("output", "down", "head"))
        if how == "everything random":
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif how == ("vectors at zero" if vector else "outputs at zero") and (vector or last):
            parameter.zero_()
        elif how == "norms at one" and "norm" in name and vector:
            parameter.fill_(1.0)
