"""Speed of the E-step's engine on models of three sizes; not collected by pytest.

    python -m tests.bench_sample sample --size S     K = 8 draws per ragged prompt, useful tokens per second
    python -m tests.bench_sample score --size S      log p of ragged sequences, tokens per second
    python -m tests.bench_sample shared --size S     log p of K sequences after a prefix, with and without sharing it
    python -m tests.bench_sample flips --size S      how often other numbers of rows change a draw
    python -m tests.bench_sample precision --checkpoint CKPT --data CORPUS    what bfloat16 does to weights and choices
    python -m tests.bench_sample e_step              the embedded corpus: the share of an E-step's time in model passes

sizes   S: 4 layers, width 256, 4 heads, ffn 688, vocabulary 512
        M: 12 layers, width 768, 12 heads, ffn 2048, vocabulary 50304
        B: the shape of SmolLM2-135M: 30 layers, width 576, 9 heads, 3 kv heads, ffn 1536, vocabulary 49152
sample  prompts of 64 to 200 tokens, at most 128 new ones; the stop id has probability 1/50 a step, only tokens before
        it count
score   eight sequences per --prompts, of 100 to 300 tokens

The workload is one that any other engine can be given. The last line is JSON; ratios measured in turn on one machine
count, absolute speeds do not.

What bounds it in bfloat16 on one core with AMX (profiles of 2026-11-25): scoring S spends 26% in matrix products, 23%
in scaled_dot_product_attention, 18% in elementwise products of norms, rotation and the MLP, 6% in silu; only fusing
these would help much, and compiling takes 16 to 31 s for 1.2 x. bmm + softmax for attention is slower (.86), RMSNorm
without a float32 copy gains 1.06. Sampling S spends 25% in the products with the weights and 21% in those of
attention; the rest is spread over 60 small operations a layer. Keys and values that did not fill their memory cost 1.3
x (products of parts of a tensor are first copied), a bfloat16 head gains 1.6 x in scoring M.

On one with avx512_bf16 (2026-11-26) scoring S spends 56% in matrix products, which run at the rate of one large
product, and 27% in scaled_dot_product_attention: with all the rest free it would be 1.2 x as fast.
"""
import argparse
import json
import math
import random
import statistics
import tempfile
import time

import torch

import sample_latents
from data.alchemy import prepare
from data.corpus import read_corpus, texts_of
from data.layout import TEXT, Layout, Sequence
from data.loader import collate
from data.run import Ranks, start_ranks
from data.tokens import Tokenizer
from model import GPT, GPTConfig, read_checkpoint, restore
from sample_latents import (SampleConfig, at_precision, e_step, effective_sample_size, generate, infer, places_to_infer,
                            proposal_log_probs, resample, score_joint, settled_sample, survey, uniform_numbers,
                            vocabulary_mask)
from tests.conftest import encode_corpus, tokenizer_for

SIZES = {"S": dict(layers=4, width=256, heads=4, kv_heads=4, ffn=688, vocab_size=512),
         "M": dict(layers=12, width=768, heads=12, kv_heads=12, ffn=2048, vocab_size=50304),
         "B": dict(layers=30, width=576, heads=9, kv_heads=3, ffn=1536, vocab_size=49152)}
STOP, MAX_NEW = 2, 128


class StoppingGPT(GPT):
    """An untrained model whose stop id has probability 1/50."""

    def logits(self, hidden):
        logits = super().logits(hidden)
        logits[..., STOP] += math.log((self.config.vocab_size - 1) / 49)
        return logits


def build(args) -> GPT:
    model = StoppingGPT(GPTConfig(context=1024, tied=True, embedding_std=0.02, **SIZES[args.size])).to(args.device)
    return at_precision(model, args.dtype)


def timed(job, args) -> dict:
    """Median, lowest and highest tokens per second of job() -> tokens, after one warm-up."""
    job()
    speeds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        tokens = job()
        speeds.append(tokens / (time.perf_counter() - start))
    figures = dict(tokens_per_second=statistics.median(speeds), low=min(speeds), high=max(speeds))
    return {name: round(speed, 1) for name, speed in figures.items()}


def random_ids(rng, args, low, high) -> list[int]:
    return [rng.randrange(10, SIZES[args.size]["vocab_size"]) for _ in range(rng.randint(low, high))]


def text(ids: list[int]) -> Sequence:
    return Sequence().add(TEXT, ids)


def draw(model, args, rows):
    rng = random.Random(1)
    prompts = [random_ids(rng, args, args.prefix or 64, args.prefix or 200) for _ in range(args.prompts)]
    uniforms = uniform_numbers(0, "bench", (), (args.prompts, args.k, MAX_NEW))
    return generate(model, prompts, uniforms, stop=[STOP], banned=[], rows=rows)


def sample(args) -> dict:
    model, shares = build(args), []

    def job():
        drawn = draw(model, args, args.rows)
        shares.append(drawn.num_tokens / drawn.row_steps)
        return sum(map(len, drawn.ids))
    return timed(job, args) | {"useful_row_steps": round(shares[0], 4)}


def score(args) -> dict:
    model, rng = build(args), random.Random(2)
    texts = [random_ids(rng, args, 100, 300) for _ in range(args.prompts * 8)]
    firsts, rest = [ids[:1] for ids in texts], [text(ids[1:]) for ids in texts]

    def job():
        sample_latents.score(model, firsts, range(len(texts)), rest)
        return sum(map(len, texts))
    return timed(job, args)


def shared(args) -> dict:
    """Sequences of 20 to 100 tokens after prefixes of --prefix tokens; only they count."""
    model, rng = build(args), random.Random(3)
    prompts = [random_ids(rng, args, max(1, args.prefix), max(1, args.prefix)) for _ in range(args.prompts)]
    parts = [random_ids(rng, args, 20, 100) for _ in range(args.prompts * args.k)]
    owners, tokens = [n for n in range(args.prompts) for _ in range(args.k)], sum(map(len, parts))
    whole = [text(ids).after(prompts[n][1:]) for n, ids in zip(owners, parts)]
    firsts = [prompts[n][:1] for n in owners]
    ours = timed(lambda: sample_latents.score(model, prompts, owners, list(map(text, parts))).numel() and tokens, args)
    plain = timed(lambda: sample_latents.score(model, firsts, range(len(whole)), whole).numel() and tokens, args)
    speed = plain["tokens_per_second"]
    return ours | {"without_sharing": speed, "ratio": round(ours["tokens_per_second"] / speed, 2)}


def flips(args) -> dict:
    """Draws that change with the number of rows."""
    model = build(args)
    base = draw(model, args, 64)
    changed = {}
    for rows in (1, 7, 16, 33, 1000):
        changed[rows] = sum(a != b for a, b in zip(base.ids, draw(model, args, rows).ids))
    return {"draws": len(base.ids), "tokens": sum(map(len, base.ids)), "changed_draws": changed}


def scored_proposal(model, layout, places, latents, config) -> torch.Tensor:
    """log q of finished draws by whole sequences through the model: what `propose` sums up token by token."""
    others = [i for i in layout.tokenizer.marker.values() if i != layout.eol]
    banned, log_q = vocabulary_mask(model, others), []
    for place, draws in zip(places, latents):
        prompt = layout.posterior_prompt(*place)
        rows = [[text(ids + [layout.eol]).after(prompt)] for ids in draws]
        batch = collate(rows, max(len(row[0].ids) for row in rows) - 1)
        logits = model.logits(model.hidden(batch.ids))
        each = proposal_log_probs(logits.flatten(0, 1), config.temperature, banned).view(logits.shape)
        each = each.gather(-1, batch.targets.clamp(min=0)[..., None]).squeeze(-1)
        log_q.append((each * (batch.targets >= 0)).sum(-1))
    return torch.stack(log_q)


def precision(args) -> dict:
    """The sampler's log-probs against whole passes at the same and at full precision, and the weights each gives."""
    state = read_checkpoint(args.checkpoint)
    model, layout = restore(state), Layout(Tokenizer(**state["tokenizer"]))
    low, config = at_precision(model, "bfloat16"), SampleConfig(num_latents=args.k)
    documents = encode_corpus(read_corpus(args.data)[:args.prompts], layout.tokenizer)
    places = [place for document in documents for place in places_to_infer(layout, document)]
    drawn = infer(low, layout, places, config, 1)
    rows = drawn.finished.all(dim=-1)
    uniforms = uniform_numbers(0, "bench", (), (int(rows.sum()),))

    def weigh(joint, proposal):
        weights = (joint - proposal)[rows].softmax(-1)
        return resample(weights, uniforms), effective_sample_size(weights).mean().item()
    scored, exact_q = (scored_proposal(m, layout, places, drawn.latents, config) for m in (low, model))
    joint, exact = (score_joint(m, layout, places, drawn.latents)[0] for m in (low, model))
    results = {"sampler": weigh(joint, drawn.log_proposal), "rescored": weigh(joint, scored),
               "float32": weigh(exact, exact_q)}

    def std(a, b):
        return float(f"{(a - b)[rows].std().item():.2g}")
    pairs = (("sampler", "float32"), ("rescored", "float32"), ("sampler", "rescored"))
    kept_changed = {f"{a} {b}": (results[a][0] != results[b][0]).float().mean().item() for a, b in pairs}
    return {"chunks": int(rows.sum()), "sampler_minus_rescored_q": std(drawn.log_proposal, scored),
            "q_minus_float32": std(scored, exact_q), "p_minus_float32": std(joint, exact),
            "ess": {name: round(ess, 3) for name, (_, ess) in results.items()}, "kept_changed": kept_changed}


def e_step_of_corpus(args) -> dict:
    """An E-step of the embedded corpus with an untrained model of the default shape that stops after ten tokens."""
    with tempfile.TemporaryDirectory() as folder:
        prepare.main(["--out", folder])
        records = read_corpus(f"{folder}/raw.jsonl")
        tokenizer = tokenizer_for(texts_of(records + read_corpus(f"{folder}/gold.jsonl"), "words"), "words")
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size)).to(args.device)
        seconds, depth = 0.0, 0

        def clocked(method):
            def run(*arguments, **named):
                nonlocal seconds, depth
                start, depth = time.perf_counter(), depth + 1
                out = method(*arguments, **named)
                depth -= 1
                seconds += 0.0 if depth else time.perf_counter() - start
                return out
            return run
        model.hidden, model.logits, model.forward = clocked(model.hidden), clocked(model.logits), clocked(model.forward)
        start = time.perf_counter()
        alone = Ranks(0, 1, torch.device(args.device))
        config = settled_sample(SampleConfig(num_latents=args.k, rows=args.rows), model.config, alone)
        raw, out = f"{folder}/raw.jsonl", f"{folder}/out.jsonl"
        [blocks] = survey(raw, Layout(tokenizer), config)
        figures = e_step(model, tokenizer, raw, blocks, config, 1, out, alone)
        whole = time.perf_counter() - start
    return {"tokens_per_second": round(figures["sampled_tokens"] / whole), "seconds": round(whole, 2),
            "in_model_passes": round(seconds / whole, 3)}


def main() -> None:
    jobs = {"sample": sample, "score": score, "shared": shared, "flips": flips, "precision": precision,
            "e_step": e_step_of_corpus}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--k", type=int, default=8, help="draws per prompt")
    parser.add_argument("--prefix", type=int, default=0, help="tokens of every prompt; 0: ragged, or none")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", default="runs/bolt/warm/ckpt.pt")
    parser.add_argument("--data", default="runs/bolt/corpus/raw.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start_ranks(args.device)
    with torch.inference_mode():
        print(json.dumps(dict(engine="nanoBoLT", torch=torch.__version__, **jobs[args.job](args), **vars(args))))


if __name__ == "__main__":
    main()
