"""The GPT: integers in, log-probabilities out. One Llama-style network is prior, likelihood and posterior of BoLT.

    config -> KV cache -> rotary positions -> attention -> MLP -> block -> GPT -> checkpoint

Shapes: B rows, T positions, S slots of the KV cache, V vocabulary, E width, H heads, G key-value heads, D head size.
Log-probabilities are float32 and in nats, whatever dtype the network computes in.
"""
import copy
import math
import os
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = field(default=0, metadata={"help": "entries of the vocabulary; 0: as many as the tokenizer has"})
    context: int = field(default=256, metadata={"help": "longest sequence, in tokens"})
    layers: int = field(default=2, metadata={"help": "transformer blocks"})
    width: int = field(default=64, metadata={"help": "size of the residual stream"})
    heads: int = field(default=2, metadata={"help": "query heads; must divide the width"})
    kv_heads: int = field(default=2, metadata={"help": "key-value heads; must divide the heads"})
    ffn: int = field(default=160, metadata={"help": "hidden size of the SwiGLU"})
    rope_base: float = field(default=100.0, metadata={"help": "base of the rotary frequencies; open models have 10000 or more"})
    embedding_std: float = field(default=0.2, metadata={"help": "initial std of the embedding; large helps tiny models"})
    tied: bool = field(default=False, metadata={"help": "share the embedding with the output head"})

    def __post_init__(self):
        for name in ("context", "layers", "width", "heads", "kv_heads", "ffn"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--model.{name} {getattr(self, name)} is not allowed; give a number above 0")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} over {self.heads} heads is no even head size; change width or heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}; change one of them")

    @property
    def head_size(self) -> int:
        return self.width // self.heads


# ---- KV cache --------------------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of past tokens, (layer, row, kv head, slot, head dim). Slot = position.

    The token at position p of a row lies in slot p, and a query at p sees the slots <= p. So rows may have different
    lengths: what padding left behind in later slots is overwritten before any query may look at it.
    """

    def __init__(self, config: GPTConfig, rows: int, slots: int, device, dtype=torch.float32):
        shape = (config.layers, rows, config.kv_heads, slots, config.head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """keys, values: (B, G, T, D), stored in the slots `positions` (B, T) of their rows."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, positions] = values.transpose(1, 2).to(self.values.dtype)

    def read(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `slots` slots: two views (B, G, slots, D)."""
        return self.keys[layer, :, :, :slots], self.values[layer, :, :, :slots]

    def rows(self, rows) -> "KVCache":
        """The cache of some rows: a view for a slice, a copy for a mask."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, rows], self.values[:, rows]
        return part

    def copy_rows(self, rows: Tensor, source: "KVCache", source_rows: Tensor) -> None:
        """Put rows of another cache, with as many slots or fewer, into rows of this one: a prompt goes to its draws."""
        slots = source.keys.shape[3]
        self.keys[:, rows, :, :slots] = source.keys[:, source_rows]
        self.values[:, rows, :, :slots] = source.values[:, source_rows]


# ---- the network -----------------------------------------------------------------------------------------------

def rotary_table(config: GPTConfig) -> Tensor:
    """cos and sin of position x frequency: (2, context + 1, D / 2), float32. The last position is for padding."""
    half = config.head_size // 2
    frequencies = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(config.context + 1, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate feature i with feature i + D/2 (the half-rotated convention). x (B, H, T, D), rotary (2, [B, 1,] T, D/2)."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_size, self.layer = config.heads, config.kv_heads, config.head_size, layer
        self.query = nn.Linear(config.width, config.heads * config.head_size, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.out = nn.Linear(config.heads * config.head_size, config.width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KVCache | None, positions) -> Tensor:
        B, T, E = x.shape
        q = rotate(self.query(x).view(B, T, self.heads, self.head_size).transpose(1, 2), rotary)      # (B, H, T, D)
        k = rotate(self.key(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2), rotary)     # (B, G, T, D)
        v = self.value(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)                   # (B, G, T, D)
        if cache is not None:
            cache.write(self.layer, k, v, positions)
            k, v = cache.read(self.layer, slots=mask.shape[-1])                                       # (B, G, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn, bias=False)
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.out = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(config.width, eps=1e-5), Attention(config, layer)
        self.mlp_norm, self.mlp = nn.RMSNorm(config.width, eps=1e-5), MLP(config)

    def forward(self, x: Tensor, rotary: Tensor, mask, cache, positions) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache, positions)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """`forward` is every log-probability of the project; the sampler steps through `hidden` and `logits`."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.layers)])
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fresh weights in place, the same for a seed on every device.

        Matrices keep the scale of what they read (std 1 / sqrt(fan in)); those that write to the residual stream start
        smaller by sqrt(2 layers); a head of its own starts at zero, so that the first loss is exactly ln(vocabulary).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            elif name == "head.weight":
                weight.zero_()
            else:
                std = self.config.embedding_std if name == "embedding.weight" else weight.shape[1] ** -0.5
                if name.endswith("out.weight"):
                    std /= math.sqrt(2 * self.config.layers)
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    def hidden(self, ids: Tensor, document: Tensor | None = None,
               cache: KVCache | None = None, positions: Tensor | None = None, slots: int = 0) -> Tensor:
        """The last hidden states, (B, T, E).

        ids: (B, T). document: (B, T) numbers the documents packed in a row; a token sees its own only.
        With a cache: `positions` (B, T) says where each token stands, `slots` how many slots of the cache are read
        (one more than the largest position).
        """
        B, T = ids.shape
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context}; raise --model.context")
        if cache is not None:
            mask = torch.arange(slots, device=ids.device) <= positions[:, None, :, None]              # (B, 1, T, S)
            rotary = self.rotary[:, positions][:, :, None]                                            # (2, B, 1, T, D/2)
        else:
            mask = None if document is None else same_document_and_causal(document)                   # (B, 1, T, T)
            rotary = self.rotary[:, :T]                                                               # (2, T, D/2)
        x = self.embedding(ids)                                                                       # (B, T, E)
        for block in self.blocks:
            x = block(x, rotary, mask, cache, positions)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V) float32."""
        return self.head(hidden).float()

    def forward(self, ids: Tensor, targets: Tensor, document: Tensor | None = None,
                cache: KVCache | None = None, positions: Tensor | None = None, slots: int = 0) -> Tensor:
        """log p(target | the tokens up to and with its position), (B, T) float32, nats; 0 where a target is negative.

        ids, targets: (B, T) integers; targets[b, t] is what follows ids[b, t]. The other arguments: see `hidden`.
        """
        logits = self.logits(self.hidden(ids, document, cache, positions, slots))                     # (B, T, V)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=-1), ignore_index=-1, reduction="none")
        return -nll.view(targets.shape)

    def num_parameters(self) -> int:
        """Parameters that multiply activations: all but an embedding table of its own."""
        total = sum(weight.numel() for weight in self.parameters())
        return total if self.config.tied else total - self.embedding.weight.numel()


def same_document_and_causal(document: Tensor) -> Tensor:
    """The attention mask of packed rows: (B, T) document numbers -> (B, 1, T, T), True where a query may look.

        document  0 0 1 1      x . . .
                               x x . .
                               . . x .
                               . . x x
    """
    T = document.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=document.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


# ---- checkpoint ------------------------------------------------------------------------------------------------

def save_checkpoint(path: str, model: GPT, **state) -> None:
    """Write model, its config and whatever a resume needs; whole or not at all (temporary name, then rename)."""
    temporary = f"{path}.tmp"
    torch.save({"model_config": asdict(model.config), "model": model.state_dict(), **state}, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: str, device="cpu") -> tuple[GPT, dict]:
    """The model on `device` and the other things saved with it.

    Raises FileNotFoundError where there is no file, ValueError where it is not a checkpoint of this project.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path!r}; make one with: python train.py --out {os.path.dirname(path)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**state.pop("model_config")))
        model.load_state_dict(state.pop("model"))
    except Exception as error:
        raise ValueError(f"{path!r} is not a whole checkpoint of nanoBoLT ({type(error).__name__})") from error
    return model.to(device), state
