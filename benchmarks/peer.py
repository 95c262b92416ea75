"""The peer of benchmarks/train.py: a plain PyTorch DiT of our network's shape, compiled, on unpacked batches.

It has bf16 weights, or fp32 under autocast, and fused AdamW, and neither clipping nor averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import LAYERS, LORA, PATCH, TEXT, TEXT_WIDTH, WIDTH


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by cuDNN, [B, H, T, C].

    By name, since the compiler does not choose it when all else is forbidden, but falls back to plain products.
    """
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0]


attention: Callable[..., Tensor] = F.scaled_dot_product_attention
"""The peer's attention; a benchmark may set another one before the first step."""


class PlainBlock(nn.Module):
    """Self-attention, cross-attention, MLP, each with adaLN-LoRA; q/k norms; [B, T, D]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # Self-attention.
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        # Cross-attention.
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.cross_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(TEXT_WIDTH, 2 * WIDTH, bias=False)
        # MLP.
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        # Modulation: shift, scale and gate of each of the three.
        self.down = nn.Linear(WIDTH, LORA, bias=False)
        self.up = nn.Linear(LORA, 9 * WIDTH, bias=False)
        # The norms of q and k, in both attentions.
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(WIDTH // heads)) for _ in range(4))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        q = F.rms_norm(q, q.shape[-1:], q_norm, 1e-6)
        k = F.rms_norm(k, k.shape[-1:], k_norm, 1e-6)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, noise: Tensor, text: Tensor) -> Tensor:
        """[B, T, D], [B, D], [B, L, E] -> [B, T, D]"""
        split = (self.heads, WIDTH // self.heads)
        m = self.up(self.down(F.silu(noise))).unsqueeze(1).chunk(9, dim=-1)

        def modulated(x: Tensor, i: int) -> Tensor:
            return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + m[i + 1]) + m[i]

        # Self-attention.
        q, k, v = self.qkv(modulated(x, 0)).unflatten(-1, (3, *split)).unbind(2)
        x = x + m[2] * self.proj(self._attend(q, k, v, self.norms[0], self.norms[1]))

        # Cross-attention.
        k, v = self.kv(text).unflatten(-1, (2, *split)).unbind(2)
        q = self.q(modulated(x, 3)).unflatten(-1, split)
        x = x + m[5] * self.cross_proj(self._attend(q, k, v, self.norms[2], self.norms[3]))

        # MLP.
        hidden = F.gelu(self.fc1(modulated(x, 6)), approximate="tanh")
        return x + m[8] * self.fc2(hidden)


class PlainDiT(nn.Module):
    """Our network, without packing."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH, WIDTH)
        self.final = nn.Linear(WIDTH, PATCH)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(PlainBlock(heads) for _ in range(LAYERS))

    def forward(self, patches: Tensor, positions: Tensor, level: Tensor, text: Tensor) -> Tensor:
        """[B, T, P], [T, D], [B, D], [B, L, E] -> [B, T, P]"""
        x = self.embed(patches) + positions
        noise = self.time(level)
        for block in self.blocks:
            x = _compiled(block, x, noise, text)
        return self.final(x)


_compiled = torch.compile(lambda block, *inputs: block(*inputs), dynamic=False, fullgraph=True)
"""Once for each shape; every block is of one code."""


class Peer:
    """Training steps of the plain DiT on batches of given (images, tokens)."""

    def __init__(self, heads: int, weights: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = PlainDiT(heads).to("cuda", weights)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.autocast = weights == torch.float32
        self._graph: Any = None

    def batch(self, images: int, tokens: int) -> tuple[Tensor, ...]:
        """Patches, positions, noise level, text, and the target."""
        kind = {"device": "cuda", "dtype": torch.bfloat16}
        return (
            torch.randn(images, tokens, PATCH, **kind),
            torch.randn(tokens, WIDTH, **kind),
            torch.randn(images, WIDTH, **kind),
            torch.randn(images, TEXT, TEXT_WIDTH, **kind),
            torch.randn(images, tokens, PATCH, **kind),
        )

    def step(self, batch: tuple[Tensor, ...]) -> None:
        """A training step."""
        if self._graph is None:
            self._forward_backward(batch)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return
        # The graph reads its own inputs, and writes its own gradients anew.
        graph, inputs = self._graph
        for mine, theirs in zip(inputs, batch, strict=True):
            mine.copy_(theirs)
        graph.replay()
        self.optimizer.step()

    def capture(self, batch: tuple[Tensor, ...]) -> None:
        """From now on, forward and backward from a CUDA graph."""
        # Steps before it, on the stream of the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._forward_backward(batch)
                self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)

        graph = torch.cuda.CUDAGraph()
        inputs = tuple(x.clone() for x in batch)
        with torch.cuda.graph(graph, stream=stream):
            self._forward_backward(inputs)
        self._graph = (graph, inputs)

    def _forward_backward(self, batch: tuple[Tensor, ...]) -> None:
        *inputs, target = batch
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            output = self.model(*inputs)
        loss = (output.float() - target.float()).square().mean()
        loss.backward()
