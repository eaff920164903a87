"""The E-step: draw K thoughts for every chunk of text, weigh each by p(z, x | C) / q(z | x, C), keep one by its weight.

    python sample_latents.py --checkpoint runs/train/ckpt.pt --data data/alchemy/raw.jsonl --out latents.jsonl
    torchrun --standalone --nproc_per_node=2 sample_latents.py ...        the same file, drawn by two processes

The output is the corpus with a latent per chunk and the evidence to recompute the choice; train.py reads it as it is.
Ids are sampled, the same ids are scored, and the same ids are trained on: no text stands between.

    config -> drawing a token -> decoding in slots -> propose -> score_joint -> the estimator -> E-step -> main

Shapes: N chunks, K draws each, L most new tokens of a draw, S slots (rows that decode together), V vocabulary.
"""
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.layout import Document, Layout, Sequence, encode_corpus, read_corpus
from data.loader import padded_batches
from data.run import Ranks, open_run, option, parse_config, random_stream, require_positive, script, start_ranks, write_jsonl
from data.tokens import Tokenizer
from model import GPT, KVCache, load_checkpoint


# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SampleConfig:
    num_latents: int = option(16, "K, the thoughts drawn per chunk")
    temperature: float = option(1.3, "of the proposal, which log_proposal counts; above 1 it explores more")
    max_latent_tokens: int = option(32, "a draw that is longer is unfinished: weight zero, never trained on")
    slots: int = option(512, "rows that decode together")
    block_documents: int = option(1000, "documents per block; a block is drawn, scored and written as one")
    score_tokens: int = option(4096, "tokens per batch when scoring")
    seed: int = option(0, "of the draws and of the choice among them")

    def __post_init__(self):
        require_positive(self, "num_latents", "temperature", "max_latent_tokens", "slots", "block_documents", "score_tokens")


# ---- drawing a token -------------------------------------------------------------------------------------------

def proposal_log_probs(logits: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """log q(next token), (B, V) float32 nats: softmax at a temperature over the ids that are not banned.

    logits (B, V), banned (V,) bool. Never truncated (no top-k, no top-p): importance sampling needs the whole support.
    """
    return (logits / temperature).masked_fill(banned, -math.inf).log_softmax(dim=-1)


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The index that each uniform number picks: (B, V) and (B,) -> (B,). An entry of probability 0 is never picked.

    The uniforms are multiples of 2^-23 below 1, so that uniform x total stays below the total in float32. No binary
    search: a parallel cumsum, as on CUDA, is not quite monotone, and an entry of probability 0 could be hit.
    """
    cdf = probabilities.cumsum(dim=-1).where(probabilities > 0, 0.0)
    return (cdf > uniforms[:, None] * cdf.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)      # the first that exceeds


def uniform_numbers(seed: int, purpose: str, labels: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """float32 multiples of 2^-23 in [0, 1), a function of (seed, purpose, labels)."""
    return torch.from_numpy(random_stream(seed, purpose, *labels).integers(2 ** 23, size=shape)).float() / 2 ** 23


# ---- decoding in slots -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Generated:
    """What was decoded after each of N x K prompts: new ids without the stop id, nats of the distribution that was
    sampled (the stop id's counted once), and whether a stop id came within the cap."""
    ids: list[list[int]]
    log_prob: Tensor        # (N K,) float32
    finished: Tensor        # (N K,) bool

    @property
    def num_tokens(self) -> int:
        """Tokens drawn, stop ids included."""
        return sum(map(len, self.ids)) + int(self.finished.sum())


def prefill(model: GPT, prompts: list[list[int]], batch_rows: int = 128) -> KVCache:
    """Keys and values of the prompts, a row each. Shorter prompts leave padding in later slots, which decoding
    overwrites before it looks there. The last token of a prompt is only fed in decoding, as its first step."""
    device, longest = model.embedding.weight.device, max(map(len, prompts))
    cache = KVCache(model.config, len(prompts), longest, device)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt)] = torch.tensor(prompt)
    for start in range(0, len(prompts), batch_rows):
        part = ids[start:start + batch_rows].to(device)
        positions = torch.arange(longest, device=device).expand(part.shape)
        model.hidden(part, cache=cache.rows(slice(start, start + batch_rows)), positions=positions, slots=longest)
    return cache


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], uniforms: Tensor, *, stop: Tensor, banned: Tensor,
             temperature: float = 1.0, slots: int = 512, greedy: bool = False) -> Generated:
    """Decode K continuations of each of N prompts, until a stop id or for L tokens at most.

    uniforms: (N, K, L), a number for every token that may be drawn. stop, banned: (V,) bool. The slots hold as many
    draws as fit; when a draw ends its slot takes the next one, so no draw waits for the longest.
    """
    N, K, L = uniforms.shape
    check_room(model, prompts, L)
    device, total = model.embedding.weight.device, N * K
    stop, banned, uniforms = stop.to(device), banned.to(device), uniforms.reshape(total, L).to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    last_ids = torch.tensor([prompt[-1] for prompt in prompts], device=device)
    prompt_cache = prefill(model, prompts)
    slots = min(slots, total)
    cache = KVCache(model.config, slots, int(lengths.max()) + L, device)

    ids = torch.zeros(total, L, dtype=torch.long, device=device)
    count = torch.zeros(total, dtype=torch.long, device=device)         # new tokens of each draw so far
    log_prob = torch.zeros(total, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)
    draw = torch.arange(slots, device=device)                           # (S,) the draw that a slot holds
    cache.copy_rows(draw, prompt_cache, draw // K)
    token, waiting = last_ids[draw // K], slots                         # (S,); the first draw still without a slot

    while len(draw):
        position = lengths[draw // K] - 1 + count[draw]                 # (S,)
        hidden = model.hidden(token[:, None], cache=cache, positions=position[:, None], slots=int(position.max()) + 1)
        log_q = proposal_log_probs(model.logits(hidden[:, 0]), temperature, banned)           # (S, V)
        token = log_q.argmax(dim=-1) if greedy else inverse_cdf(log_q.exp(), uniforms[draw, count[draw]])
        log_prob[draw] += log_q.gather(1, token[:, None]).squeeze(1)
        ids[draw, count[draw]] = token
        finished[draw] = stop[token]
        count[draw] += 1
        ended = (stop[token] | (count[draw] == L)).nonzero().squeeze(1)
        refill = ended[:total - waiting]                                # slots that take the next draws
        draw[refill] = torch.arange(waiting, waiting + len(refill), device=device)
        waiting += len(refill)
        cache.copy_rows(refill, prompt_cache, draw[refill] // K)
        token[refill] = last_ids[draw[refill] // K]
        if len(ended) > len(refill):                                    # nothing waits: drop the rows that ended
            alive = torch.ones(len(draw), dtype=torch.bool, device=device)
            alive[ended[len(refill):]] = False
            draw, token, cache = draw[alive], token[alive], cache.rows(alive)
    lengths = (count - finished.long()).tolist()
    return Generated([row[:n] for row, n in zip(ids.tolist(), lengths)], log_prob.cpu(), finished.cpu())


def check_room(model: GPT, prompts: list[list[int]], new_tokens: int) -> None:
    longest = max(map(len, prompts))
    if longest + new_tokens > model.config.context:
        raise ValueError(f"a prompt of {longest} tokens and {new_tokens} new ones do not fit the context of "
                         f"{model.config.context}; lower --max_latent_tokens or train with a larger --model.context")


def vocabulary_mask(model: GPT, *ids: int) -> Tensor:
    """(V,) bool, True at the given ids."""
    mask = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    mask[list(ids)] = True
    return mask


# ---- propose and score -----------------------------------------------------------------------------------------

Place = tuple[Document, int]        # a chunk: its document and its number there


def places_to_infer(document: Document) -> list[Place]:
    """The chunks of a document that want a thought: observed, and without one."""
    return [(document, c) for c, chunk in enumerate(document.chunks) if not chunk.given and chunk.latent is None]


def latent_uniforms(seed: int, round: int, document: int, chunk: int, num_latents: int, max_tokens: int) -> Tensor:
    """A number for each draw and position, (K, L): a function of (seed, round, document, chunk, draw, position) alone.

    Each 32 positions have a stream of their own, drawn row by row, so neither K nor the cap L changes any number.
    """
    blocks = [uniform_numbers(seed, "latent", (round, document, chunk, block), (num_latents, 32))
              for block in range(math.ceil(max_tokens / 32))]
    return torch.cat(blocks, dim=1)[:, :max_tokens]


def propose(model: GPT, layout: Layout, places: list[Place], config: SampleConfig, round: int) -> Generated:
    """K thoughts z ~ q(. | x, C) for each of N chunks, and log q of each (log_prob counts z and EOL).

    Only EOL among the markers can be drawn. A draw's numbers depend on (seed, round, document, chunk, draw, position).
    """
    uniforms = torch.stack([
        latent_uniforms(config.seed, round, document.index, c, config.num_latents, config.max_latent_tokens)
        for document, c in places])                                                           # (N, K, L)
    others = [i for i in layout.tokenizer.marker.values() if i != layout.eol]
    prompts = [layout.posterior_prompt(document, c) for document, c in places]
    return generate(model, prompts, uniforms, stop=vocabulary_mask(model, layout.eol),
                    banned=vocabulary_mask(model, *others), temperature=config.temperature, slots=config.slots)


def score_joint(model: GPT, layout: Layout, places: list[Place], latents: list[list[list[int]]],
                batch_tokens: int) -> tuple[Tensor, int]:
    """log p(z, x | C) of K thoughts for each of N chunks, (N, K) float32 nats, and the tokens that went through the model.

    Counts z, EOL and x, at temperature 1. C SOL PRIOR is prefilled once a chunk; equal draws of a chunk are scored once.
    """
    order, owners, sequences = {}, [], []
    prompts = [layout.prior_prompt(*place) for place in places]
    for n, place in enumerate(places):
        for latent in map(tuple, latents[n]):
            if (n, latent) not in order:
                order[n, latent] = len(sequences)
                owners.append(n)
                sequences.append(layout.joint(*place, list(latent)).part(len(prompts[n]) - 1))
    log_p = score_after_prompts(model, prompts, owners, sequences, batch_tokens)
    rows = [[order[n, tuple(latent)] for latent in draws] for n, draws in enumerate(latents)]
    return log_p[torch.tensor(rows)], sum(map(len, prompts)) + sum(len(sequence.ids) - 1 for sequence in sequences)


@torch.inference_mode()
def score_after_prompts(model: GPT, prompts: list[list[int]], owners: list[int], sequences: list[Sequence],
                        batch_tokens: int) -> Tensor:
    """The log-probability of each sequence after the prompt `owners` gives it, (len(sequences),) float32 nats.

    A sequence starts with the last token of its prompt. Padding stands in the slot after the context.
    """
    device, log_p = model.embedding.weight.device, torch.zeros(len(sequences))
    check_room(model, prompts, 0)
    prompt_cache = prefill(model, prompts)
    starts, owners = torch.tensor([len(prompt) - 1 for prompt in prompts]), torch.tensor(owners)
    for places, batch in padded_batches(sequences, batch_tokens):
        batch, owner = batch.to(device), owners[places]
        positions = starts[owner][:, None] + torch.arange(batch.ids.shape[1])                 # (B, T)
        last = torch.tensor([len(sequences[place].ids) - 1 for place in places])[:, None]
        if int((starts[owner][:, None] + last).max()) > model.config.context:
            raise ValueError(f"a thought and its text do not fit the context of {model.config.context}; "
                             "lower --max_latent_tokens or train with a larger --model.context")
        positions = positions.clamp(max=model.config.context).to(device)
        slots = int(positions.max()) + 1
        cache = KVCache(model.config, len(places), max(slots, prompt_cache.keys.shape[3]), device)
        cache.copy_rows(torch.arange(len(places), device=device), prompt_cache, owner.to(device))
        log_p[places] = model(batch.ids, batch.targets, cache=cache, positions=positions, slots=slots).sum(dim=-1).cpu()
    return log_p


# ---- the estimator ---------------------------------------------------------------------------------------------

def log_importance_weights(log_joint: Tensor, log_proposal: Tensor) -> Tensor:
    """log w_k = log p(z_k, x | C) - log q(z_k | x, C), unnormalised.

    log_joint, log_proposal: (N, K) float32, nats; N chunks, K draws each. An unfinished draw has log_joint -inf.
    Raises ValueError where the shapes differ. Source: arXiv:2503.18866, the Monte Carlo E-step.
    """
    if log_joint.shape != log_proposal.shape:
        raise ValueError(f"log_joint {tuple(log_joint.shape)} and log_proposal {tuple(log_proposal.shape)} differ in shape")
    return log_joint - log_proposal


def effective_sample_size(weights: Tensor) -> Tensor:
    """1 / sum w^2 of normalised weights, (N, K) -> (N,), in [1, K]."""
    return 1 / weights.square().sum(dim=-1)


def importance_bound(log_weights: Tensor) -> Tensor:
    """log mean w, the K-sample lower bound on log p(x | C): (N, K) -> (N,), nats; -inf where every draw is unfinished.

    Source: Burda et al. 2016 (IWAE).
    """
    return log_weights.logsumexp(dim=-1) - math.log(log_weights.shape[-1])


def resample(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One draw per chunk, with the probability of its weight: (N, K) and (N,) -> (N,)."""
    return inverse_cdf(weights, uniforms)


@dataclass(frozen=True)
class Evidence:
    """K weighed thoughts for each of N chunks. log_joint and log_proposal (N, K); `cost` in tokens, see `infer`."""
    latents: list[list[list[int]]]
    log_joint: Tensor
    log_proposal: Tensor
    cost: dict[str, int]

    @property
    def log_weights(self) -> Tensor:
        return log_importance_weights(self.log_joint, self.log_proposal)

    @property
    def finished(self) -> Tensor:
        return self.log_joint > -math.inf


def infer(model: GPT, layout: Layout, places: list[Place], config: SampleConfig, round: int) -> Evidence:
    """Draw and weigh K thoughts for every chunk: all of the E-step but the choice.

    cost: tokens prefilled (once per chunk), sampled, and scored.
    """
    K = config.num_latents
    drawn = propose(model, layout, places, config, round)
    latents = [drawn.ids[n * K:(n + 1) * K] for n in range(len(places))]
    log_joint, scored = score_joint(model, layout, places, latents, config.score_tokens)
    assert log_joint.isfinite().all() and drawn.log_prob.isfinite().all(), "log-probabilities must be finite"
    log_joint = log_joint.masked_fill(~drawn.finished.view(-1, K), -math.inf)
    prefilled = sum(len(layout.posterior_prompt(document, c)) for document, c in places)
    cost = {"prefilled": prefilled, "sampled": drawn.num_tokens, "scored": scored}
    return Evidence(latents, log_joint, drawn.log_prob.view(-1, K), cost)


# ---- the E-step over a corpus ----------------------------------------------------------------------------------

def annotate(places: list[Place], evidence: Evidence, tokenizer: Tokenizer, config: SampleConfig, round: int) -> list[dict]:
    """What the E-step writes for each chunk: the kept latent and the evidence to recompute the choice."""
    uniforms = torch.stack([uniform_numbers(config.seed, "resample", (round, document.index, c), ())
                            for document, c in places])                                       # (N,)
    log_weights = evidence.log_weights
    usable = evidence.finished.any(dim=-1)                      # else every draw is unfinished: the chunk stays plain
    weights = log_weights.where(usable[:, None], 0.0).softmax(dim=-1)
    kept, ess, bound = resample(weights, uniforms), effective_sample_size(weights), importance_bound(log_weights)
    annotations = []
    for n, latents in enumerate(evidence.latents):
        ids = latents[kept[n]] if usable[n] else None
        annotations.append({
            "latent": None if ids is None else tokenizer.decode(ids), "latent_ids": ids,
            "log_joint": [x if x > -math.inf else None for x in evidence.log_joint[n].tolist()],
            "log_proposal": evidence.log_proposal[n].tolist(), "finished": evidence.finished[n].tolist(),
            "lengths": [len(latent) for latent in latents],
            "ess": ess[n].item() if usable[n] else None, "bound": bound[n].item() if usable[n] else None})
    return annotations


def annotate_block(model: GPT, layout: Layout, block: list[Document], config: SampleConfig, round: int) -> list[dict]:
    """The lines of the output for a block of documents. The tokens it cost stand with its first document."""
    places = [place for document in block for place in places_to_infer(document)]
    records = [document.record | {"chunks": [dict(chunk) for chunk in document.record["chunks"]]} for document in block]
    for record in records:
        record.pop("cost", None)        # of an earlier E-step
    if places:
        evidence = infer(model, layout, places, config, round)
        first = block[0].index
        for (document, c), annotation in zip(places, annotate(places, evidence, layout.tokenizer, config, round)):
            records[document.index - first]["chunks"][c] |= annotation
        records[0]["cost"] = evidence.cost
    return records


def e_step(model: GPT, tokenizer: Tokenizer, documents: list[Document], config: SampleConfig, round: int, out: str,
           ranks: Ranks) -> dict:
    """Write the corpus with a drawn latent per chunk to `out`; returns its `summarize`.

    Blocks of documents are dealt to the ranks and written whole; a run that was killed goes on after the last of them.
    A block is computed alike on any rank, so the file has the same bytes for any number of them (CPU, float32, the
    same number of threads; elsewhere floating point may flip a rare token).
    """
    parts = Path(f"{out}.parts")
    if not os.path.exists(out):
        layout, size = Layout(tokenizer), config.block_documents
        paths = [parts / f"{start:09d}.jsonl" for start in range(0, len(documents), size)]
        mine = list(enumerate(paths))[ranks.rank::ranks.world]
        bar = tqdm(mine, desc="E-step", unit="block", leave=False, disable=not ranks.main)
        for number, path in bar:
            if not path.exists():
                block = documents[number * size:(number + 1) * size]
                write_jsonl(path, annotate_block(model, layout, block, config, round))
        ranks.barrier()
        if ranks.main:
            with open(f"{out}.tmp", "wb") as file:
                for path in paths:
                    file.write(path.read_bytes())
            os.replace(f"{out}.tmp", out)
            shutil.rmtree(parts)
        ranks.barrier()
    return summarize(read_corpus(out))


def summarize(records: list[dict]) -> dict:
    """Figures of an E-step's output, over its chunks that were drawn for. Nats, tokens; means over the usable chunks."""
    drawn = [chunk for record in records for chunk in record["chunks"] if "log_proposal" in chunk]
    usable = [chunk for chunk in drawn if chunk["bound"] is not None]
    log_w = [[p - q for p, q in zip(c["log_joint"], c["log_proposal"]) if p is not None] for c in usable]
    entropy = [torch.distributions.Categorical(logits=torch.tensor(row)).entropy().item() for row in log_w]
    draws = sum(len(chunk["finished"]) for chunk in drawn)

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else math.nan
    return {"chunks": len(drawn), "left_plain": len(drawn) - len(usable),
            "ess": mean(c["ess"] for c in usable), "weight_entropy": mean(entropy),
            "unfinished": 1 - sum(sum(c["finished"]) for c in drawn) / max(1, draws),
            "latent_tokens": mean(n for c in drawn for n in c["lengths"]),
            "bound": mean(c["bound"] for c in usable), "elbo_finished": mean(x for row in log_w for x in row),
            **{f"{kind}_tokens": sum(r.get("cost", {}).get(kind, 0) for r in records)
               for kind in ("prefilled", "sampled", "scored")}}


# ---- main ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MainConfig(SampleConfig):
    checkpoint: str = option("runs/train/ckpt.pt", "the model that thinks; made by train.py")
    data: str = option("data/alchemy/raw.jsonl", "corpus to annotate; chunks that have a latent keep it")
    out: str = option("runs/latents.jsonl", "annotated corpus, which train.py --data reads")
    device: str = option("auto", "auto, cpu, cuda or mps")
    round: int = option(1, "number of the EM round; another number draws other thoughts")


def main(argv=None) -> None:
    config = parse_config(MainConfig(), argv, __doc__)
    records, ranks = read_corpus(config.data), start_ranks(config.device)
    model, state = load_checkpoint(config.checkpoint, ranks.device)
    tokenizer = Tokenizer(**state["tokenizer"])
    documents = encode_corpus(records, tokenizer)
    with open(config.checkpoint, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    started = os.path.exists(config.out) or os.path.exists(f"{config.out}.parts")
    if started and not os.path.exists(f"{config.out}.config"):
        raise ValueError(f"{config.out} is there without its {config.out}.config; "
                         "give another --out, or delete what there is of both")
    open_run(f"{config.out}.config", config, ranks, checkpoint_sha256=digest)
    ranks.say(f"drawing {config.num_latents} thoughts for each chunk of {len(documents)} documents on {ranks.device}")
    start = time.time()
    summary = e_step(model, tokenizer, documents, config, config.round, config.out, ranks)
    ranks.say(json.dumps(summary, indent=1))
    rate = "" if started else f": {summary['sampled_tokens'] / (time.time() - start):,.0f} sampled tokens/s"
    ranks.say(f"{config.out}{rate}")


if __name__ == "__main__":
    script(main)
