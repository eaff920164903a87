"""The GPT: integers in, log-probabilities out. One Llama-style network is prior, likelihood and posterior of BoLT.

    config -> KV cache -> rotary positions -> attention -> MLP -> block -> GPT -> checkpoint

Shapes: B rows, T positions, S slots of the KV cache, V vocabulary, E width, H heads, G key-value heads, D head size.
Log-probabilities are float32 and in nats, whatever dtype the network computes in.
"""
import copy
import math
import os
import sys
import zipfile
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint


SLAB = {"cpu": 2 ** 24, "mps": 2 ** 26, "cuda": 2 ** 27}       # logits that are made at once; four bytes each
BLOCKWISE = ("cuda",)       # devices whose compiled graphs have flex_attention
KEPT_SLABS = 8      # are kept for the gradient; where there are more, logits are made again

# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Shape:
    """What one chooses of a model."""
    context: int = field(default=256, metadata={"help": "longest sequence, in tokens; 0: 256, or that of the base"})
    layers: int = field(default=2, metadata={"help": "transformer blocks"})
    width: int = field(default=64, metadata={"help": "size of the residual stream"})
    heads: int = field(default=2, metadata={"help": "query heads; must divide the width"})
    head_dim: int = field(default=0, metadata={"help": "size of a head; 0: width / heads"})
    kv_heads: int = field(default=2, metadata={"help": "key-value heads; must divide the heads"})
    ffn: int = field(default=160, metadata={"help": "hidden size of the SwiGLU"})
    rope_base: float = field(default=100.0, metadata={"help": "base of the rotary frequencies; 10000 in open models"})
    embedding_std: float = field(default=0.2, metadata={"help": "initial std of the embedding; large is for tiny ones"})
    tied: bool = field(default=False, metadata={"help": "share the embedding with the output head"})

    def __post_init__(self):
        for name in ("context", "layers", "width", "heads", "kv_heads", "ffn"):
            if getattr(self, name) < (name != "context"):
                raise ValueError(f"--model.{name} {getattr(self, name)} is not allowed; give a number above 0")
        if not self.head_dim and self.width % self.heads or self.head_size % 2:
            raise ValueError(f"width {self.width} over {self.heads} heads is no even head size; change width or heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}; change one of them")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads


@dataclass(frozen=True)
class GPTConfig(Shape):
    """A shape, and what comes with a vocabulary and with an open base."""
    vocab_size: int = 0         # entries of the vocabulary, the markers included
    padding: int = 0            # rows after these, for products of an even size; no id, and not in any normaliser
    norm_eps: float = 1e-5
    qkv_bias: bool = False      # Qwen2's, of queries, keys and values
    rope_factor: float = 1.0    # llama3's: slow rotary frequencies divided by so much; those with more than
    rope_high: float = 4.0      # rope_high turns in a context of rope_original as they are, with less than rope_low
    rope_low: float = 1.0       # divided, and in between in proportion
    rope_original: int = 8192


# ---- KV cache --------------------------------------------------------------------------------------------------

class Prompts:
    """Keys and values of prompts, computed once and read by all that continue them: `kept`, (2, layer, prompt, kv head,
    slot, head dim).

    Slot = position. `lengths` (P,) is how many slots of a prompt count; what padding left in later ones is never seen.
    """

    def __init__(self, config: GPTConfig, prompts: int, slots: int, device, dtype):
        shape = (2, config.layers, prompts, config.kv_heads, slots, config.head_size)
        self.kept = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(prompts, dtype=torch.long, device=device)
        self.first = 0          # of those that go through the model now

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of whole prompts, whose keys and values are kept. q (P, H, T, D), k and v (P, G, T, D)."""
        here, T = slice(self.first, self.first + len(k)), k.shape[2]
        self.kept[0, layer, here, :, :T], self.kept[1, layer, here, :, :T] = k, v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    def only(self, used: np.ndarray) -> "Prompts":
        """These prompts, numbers in rising order, as a copy; all of them as they are."""
        if len(used) == len(self.lengths):
            return self
        some, numbers = copy.copy(self), torch.from_numpy(used).to(self.lengths.device)
        some.kept, some.lengths = self.kept.index_select(2, numbers), self.lengths[numbers]
        return some


UNSEEN = -1e30      # the score of a slot that is not seen; finite, so that a prompt without slots weighs 0 and not nan


def attend_to_part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over some of the slots, (..., N, D), and the logsumexp of its scores, (..., N, 1), float32.

    The weights of several parts are in the proportion of the exponentials of these: so several softmaxes are one.
    """
    scores = (q @ k.mT).float() + bias                                                                # (..., N, S)
    weights = scores.softmax(dim=-1)
    logsumexp = scores.amax(dim=-1, keepdim=True) - weights.amax(dim=-1, keepdim=True).log()
    return weights.to(v.dtype) @ v, logsumexp


class Branches:
    """Rows that continue prompts, any number after each. A row attends to its prompt's slots and to its own.

        prompt 0   a b c d .        row 0   x y          prompt 0, slots of its own 0 and 1 = positions 4 and 5
        prompt 1   a b c . .        row 1   x y          prompt 1, positions 3 and 4
                                    row 2   x y          prompt 0

    All rows are of one age: what they read next goes into the same slots of all. Queries of a prompt's rows are brought
    together (P prompts x R rows, padded), so that its keys and values are read once for all and copied for none.
    """

    def __init__(self, prompts: Prompts, owner: np.ndarray, slots: int = 0, fixed: bool = False):
        """Row i continues prompt owner[i]. With slots, which grow as needed, the rows' own keys and values are kept;
        else all they read comes at once. fixed: (P, R) and the memory stay as they are, for a step that is recorded.

        What is read should fill its memory: products of parts of it take four times as long in bfloat16 on a CPU.
        """
        _, layers, count, kv_heads, self.prompt_slots, head_size = prompts.kept.shape
        self.prompts, self.fixed, self.shape = prompts, fixed, (count, int(np.bincount(owner).max()))
        self.kept = prompts.kept.new_zeros(2, layers, len(owner), kv_heads, slots, head_size)
        self.where_kept, self.starts_kept = prompts.lengths.new_zeros(2, len(owner))
        self.group(owner)

    def group(self, owner: np.ndarray) -> None:
        """Find each row's place among P prompts x R rows; unless these are fixed, prompts without rows are left out."""
        if not self.fixed:
            used, owner = np.unique(owner, return_inverse=True)
            self.prompts, self.shape = self.prompts.only(used), (len(used), int(np.bincount(owner).max()))
        self.owner, by_prompt = owner, owner.argsort(kind="stable")
        number = by_prompt.argsort() - np.searchsorted(owner[by_prompt], owner)     # of a row among those of its prompt
        # always in the same memory, where a recorded step looks for it
        self.where = self.where_kept[:len(owner)].copy_(torch.from_numpy(owner * self.shape[1] + number))
        self.starts = self.starts_kept[:len(owner)].copy_(self.prompts.lengths[owner])

    def at(self, slot: Tensor, tokens: int, own_slots: int) -> None:
        """Say that the next `tokens` of every row go to `slot` (1,) and after, and how many own slots to look at."""
        def bias(slots: int, seen: Tensor) -> Tensor:       # of the first `seen` of some slots
            return torch.where(torch.arange(slots, device=slot.device) < seen, 0.0, UNSEEN)
        if 0 < self.kept.shape[4] < own_slots:
            self.kept = F.pad(self.kept[:, :, :len(self.owner)], (0, 0, 0, own_slots - self.kept.shape[4]))
        self.new = slot + torch.arange(tokens, device=slot.device)                                    # (T,)
        self.positions, self.own_slots = self.starts[:, None] + self.new, own_slots                   # (B, T)
        self.own_bias = bias(own_slots, self.new[:, None] + 1)                                        # (T, So)
        self.prompt_bias = bias(self.prompt_slots, self.prompts.lengths[:, None])[:, None, None]

    def keep(self, alive: np.ndarray) -> np.ndarray:
        """Go on with the rows that are alive, (B,) bool, the last filling gaps; returns which row each place has."""
        count = int(alive.sum())
        order, free, moved = np.arange(count), np.flatnonzero(~alive[:count]), count + np.flatnonzero(alive[count:])
        self.kept[:, :, free] = self.kept[:, :, moved]
        order[free] = moved
        self.group(self.owner[order])
        return order

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of new tokens, q (B, H, T, D), k and v (B, G, T, D), to their prompts and to their own rows."""
        (B, H, T, D), G = q.shape, k.shape[1]
        q = (q * D ** -0.5).reshape(B, G, H // G * T, D)        # the queries of a kv head, so that it is not expanded
        if self.kept.shape[4]:
            for i, new in enumerate((k, v)):
                self.kept[i, layer, :B].index_copy_(2, self.new, new)
            k, v = self.kept[:, layer, :B, :, :self.own_slots]                                        # (B, G, So, D)
        y, own_size = attend_to_part(q, k, v, self.own_bias.repeat(H // G, 1))                        # (B, G, H/G T, D)
        if self.prompt_slots:
            in_prompts = attend_to_part(self.together(q), *self.prompts.kept[:, layer], self.prompt_bias)
            prompt_y, size = map(self.apart, in_prompts)
            y = torch.lerp(y, prompt_y, torch.sigmoid(size - own_size).to(y.dtype))
        return y.view(B, H, T, D)

    def together(self, x: Tensor) -> Tensor:
        """(B, G, N, D) of rows -> (P, G, R N, D) of prompts, zero where a prompt has fewer than R rows."""
        padded = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_copy_(0, self.where, x)   # (P R, G, N, D)
        return padded.unflatten(0, self.shape).transpose(1, 2).flatten(2, 3)

    def apart(self, x: Tensor) -> Tensor:
        """The inverse of `together`."""
        return x.unflatten(2, (self.shape[1], -1)).transpose(1, 2).flatten(0, 1)[self.where]


# ---- the network -----------------------------------------------------------------------------------------------

def rotary_table(config: GPTConfig) -> Tensor:
    """cos and signed sin of position x frequency: (2, context, D), float32. See `rotate`."""
    half = config.head_size // 2
    frequencies = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    if config.rope_factor != 1:
        turns = config.rope_original * frequencies / (2 * math.pi)
        share = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)     # that stays as it is
        frequencies = frequencies * (share + (1 - share) / config.rope_factor)
    angles = torch.arange(config.context, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=-1)])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate feature i with feature i + D/2 (the half-rotated convention). x (B, H, T, D), rotary (2, [B, 1,] T, D)."""
    cos, sin = rotary.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.head_size, self.layer = config.head_size, layer
        self.query = nn.Linear(config.width, config.heads * config.head_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_size, bias=config.qkv_bias)
        self.out = nn.Linear(config.heads * config.head_size, config.width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | BlockMask | None,
                cache: Prompts | Branches | None) -> Tensor:
        B, T, E = x.shape
        q, k, v = [project(x).view(B, T, -1, self.head_size).transpose(1, 2)                          # (B, H, T, D)
                   for project in (self.query, self.key, self.value)]                                 # (B, G, T, D)
        q, k, gqa = rotate(q, rotary), rotate(k, rotary), q.shape[1] != k.shape[1]
        if cache is not None:
            y = cache.attend(self.layer, q, k, v)                                                     # (B, H, T, D)
        elif isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
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
        self.attention_norm, self.attention = nn.RMSNorm(config.width, config.norm_eps), Attention(config, layer)
        self.mlp_norm, self.mlp = nn.RMSNorm(config.width, config.norm_eps), MLP(config)

    def forward(self, x: Tensor, rotary: Tensor, mask, cache) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


def packed_mask(document: Tensor, head_size: int) -> Tensor | BlockMask:
    """The attention mask of packed rows, (B, T) document numbers: a query may look where it is True.

        document  0 0 1 1      x . . .
                               x x . .
                               . . x .
                               . . x x

    A graph compiled for CUDA gets it as blocks of 128 x 128, of which flex_attention leaves out the empty ones; else,
    and where there is but one block or heads are smaller than flex_attention takes, it is (B, 1, T, T).
    """
    (B, T), there = document.shape, torch.arange(document.shape[1], device=document.device)

    def seen(row, head, query, key):
        return (document[row, query] == document[row, key]) & (query >= key)
    if torch.compiler.is_compiling() and document.device.type in BLOCKWISE and T > 128 and head_size >= 16:
        return create_block_mask(seen, B, None, T, T, device=document.device)
    return seen(torch.arange(B, device=document.device)[:, None, None], None, there[:, None], there)[:, None]


class GPT(nn.Module):
    """`forward` is every log-probability of the project; the sampler steps through `hidden` and `logits`."""
    recompute = False       # blocks are computed again for the gradient, so that one's activations are kept at a time

    def __init__(self, config: GPTConfig, seed: int | None = 0):
        """With fresh weights; seed None leaves them as they come, for a checkpoint's."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + config.padding, config.width)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.layers)])
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size + config.padding, bias=False)
        self.register_buffer("rotary", None, persistent=False)
        self.complete()
        if seed is not None:
            self.initialize(seed)

    def complete(self) -> None:
        """What the configuration says beyond the weights: that two of them are one, and the rotary table."""
        if self.config.tied:
            self.head.weight = self.embedding.weight
        self.rotary = rotary_table(self.config)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fresh weights in place, the same for a seed on every device.

        Matrices keep the scale of what they read (std 1 / sqrt(fan in)); those that write to the residual stream start
        smaller by sqrt(2 layers); a head of its own starts at zero, so that the first loss is exactly ln(vocabulary).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(name.endswith("norm.weight"))
            elif name == "head.weight":
                weight.zero_()
            else:
                std = self.config.embedding_std if name == "embedding.weight" else weight.shape[1] ** -0.5
                if name.endswith("out.weight"):
                    std /= math.sqrt(2 * self.config.layers)
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    def hidden(self, ids: Tensor, document: Tensor | None = None, cache: Prompts | Branches | None = None) -> Tensor:
        """The last hidden states, (B, T, E).

        ids: (B, T). document: (B, T) numbers the documents packed in a row; a token sees its own only. cache: prompts
        to be filled, or branches that continue them.
        """
        B, T = ids.shape
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context}; raise --model.context")
        mask = None if document is None else packed_mask(document, self.config.head_size)
        rotary = self.rotary[:, :T]                                                                   # (2, T, D)
        if isinstance(cache, Branches):
            positions = cache.positions.clamp(max=self.config.context - 1)      # beyond it stands padding only
            rotary = self.rotary[:, positions][:, :, None]                                            # (2, B, 1, T, D)
        x = self.embedding(ids)                                                                       # (B, T, E)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, rotary, mask, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V) float32; the product itself is in the dtype of the weights, or of autocast."""
        return self.head(hidden)[..., :self.config.vocab_size].float()

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p(target) after each hidden state, (N, E) and (N,) -> (N,) float32, nats; 0 where a target is negative.

        Every log-probability of the project. Logits are made a slab at a time, so that (N, V) is never whole in memory,
        and not at all where there is no target (but in a compiled graph, whose shapes may not depend on data).
        """
        if not torch.compiler.is_compiling() and bool((targets < 0).any()):
            scored = targets >= 0
            log_p = torch.zeros(targets.shape, device=hidden.device)
            return log_p.masked_scatter(scored, self.log_probs(hidden[scored], targets[scored]))
        size = max(1, SLAB[hidden.device.type] // self.config.vocab_size)
        slabs = list(zip(hidden.split(size), targets.clamp(min=-1).split(size)))
        if len(slabs) > KEPT_SLABS and torch.is_grad_enabled():
            return torch.cat([checkpoint(self.slab, *slab, use_reentrant=False) for slab in slabs])
        return torch.cat([self.slab(*slab) for slab in slabs])

    def slab(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(self.logits(hidden), targets, ignore_index=-1, reduction="none")

    def forward(self, ids: Tensor, targets: Tensor, document: Tensor | None = None,
                cache: Prompts | Branches | None = None) -> Tensor:
        """log p(target | the tokens up to and with its position), (B, T) float32, nats; 0 where a target is negative.

        ids, targets: (B, T) integers; targets[b, t] is what follows ids[b, t]. The other arguments: see `hidden`.
        """
        return self.log_probs(self.hidden(ids, document, cache).flatten(0, 1), targets.flatten()).view(targets.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights. Logits are float32 in any case."""
        return self.norm.weight.dtype

    def num_parameters(self) -> int:
        """Parameters that multiply activations: all but an embedding table of its own."""
        total = sum(weight.numel() for weight in self.parameters())
        return total if self.config.tied else total - self.embedding.weight.numel()

    def training_flops(self, row_tokens: int) -> int:
        """FLOPs of a training step per token, in rows of so many: two for every multiplication of a parameter and of
        attention (without the causal half), once forward, twice backward. Source: arXiv:2204.02311, appendix B."""
        attention = self.config.layers * self.config.heads * self.config.head_size * row_tokens
        return 6 * self.num_parameters() + 12 * attention


# ---- checkpoint ------------------------------------------------------------------------------------------------

def unshared(value):
    """The same value, of which no part is one object by chance: pickle would write that as a reference."""
    if isinstance(value, dict):
        return {unshared(key): unshared(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(unshared, value))
    return sys.intern(value) if type(value) is str else value


def save_checkpoint(file, model: GPT, **state) -> None:
    """Write model, its config and whatever a resume needs to an open file: the same bytes for the same values."""
    torch.save(unshared({"model_config": asdict(model.config), "model": model.state_dict(), **state}), file)


def checkpoint_path(path: str) -> str:
    """The checkpoint of a run folder; a checkpoint as it is."""
    return os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path


def read_checkpoint(path: str) -> dict:
    """What `save_checkpoint` wrote, with "model_config" and "model". All tensors stay on the disk until they are used.

    path: a checkpoint, or the run folder that holds it. Raises FileNotFoundError where there is no file, ValueError
    where it is not a checkpoint of this project, or a byte of it is not what was written.
    """
    path = checkpoint_path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path!r}; give a run folder of train.py, which writes one (an open "
                                "base goes in by train.py --init_from)")
    try:
        if broken := zipfile.ZipFile(path).testzip():
            raise ValueError(f"{broken} was changed")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state["model_config"], state["model"] = GPTConfig(**state["model_config"]), dict(state["model"])
    except Exception as error:
        raise ValueError(f"{path!r} is not a whole checkpoint of nanoBoLT ({type(error).__name__})") from error
    return state


def restore(state: dict, device="cpu") -> GPT:
    """The model of a checkpoint that was read. Raises ValueError where weights and configuration do not fit."""
    with torch.device("meta"):          # no memory, no random numbers
        model = GPT(state["model_config"], seed=None)
    try:
        model.load_state_dict(state["model"], assign=True)
    except RuntimeError as error:
        raise ValueError("the weights of the checkpoint do not fit its model_config; it is not of nanoBoLT") from error
    model.complete()
    return model.to(device)
