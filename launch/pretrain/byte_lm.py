"""A small decoder-only transformer over bytes: 256 symbols, no tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_SYMBOLS = 256


@dataclass(frozen=True, kw_only=True)
class ByteLMConfig:
    """Sizes of the model; written beside the checkpoints so that a fresh process can rebuild it."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    context: int = 128  # bytes

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}, but it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> ByteLMConfig:
        return cls(**json.loads(path.read_text()))


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added after."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.feed_norm = nn.RMSNorm(config.width)
        self.feed_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.feed_out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        query_key_value = self.query_key_value(self.attention_norm(hidden))
        # (batch, bytes, 3, heads, width of a head) -> three of (batch, heads, bytes, width of a head)
        query, key, value = query_key_value.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).flatten(2))
        fed: Tensor = self.feed_out(F.gelu(self.feed_in(self.feed_norm(hidden))))
        return hidden + fed


class ByteLM(nn.Module):
    """Bytes (batch, time) to the logits of the next byte (batch, time, 256)."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.symbols = nn.Embedding(NUM_SYMBOLS, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, NUM_SYMBOLS, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # What is added to the residual stream starts smaller, the deeper the model.
                deep = name.endswith(("attention_out.weight", "feed_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.depth) ** 0.5 if deep else 0.02)

    def forward(self, text: Tensor) -> Tensor:
        time = torch.arange(text.shape[1], device=text.device)
        hidden = self.symbols(text) + self.positions(time)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def next_byte_loss(model: nn.Module, windows: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of each next byte of ``windows`` (batch, context + 1), computed in fp32."""
    logits: Tensor = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)
