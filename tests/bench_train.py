"""Speed of training, on models of three sizes, and of reading a large corpus; not collected by pytest.

    python -m tests.bench_train --size S                     forward, backward and optimizer, tokens per second
    torchrun --standalone --nproc_per_node=2 -m tests.bench_train --size S      the same batch over two processes
    python -m tests.bench_train corpus --gigabytes 1         a generated corpus: seconds to start, memory, tokens/s

sizes   S: 4 layers, width 256, 4 heads, ffn 688, vocabulary 512, rows 16 x 256 tokens
        M: 12 layers, width 768, 12 heads, ffn 2048, vocabulary 50304, rows 4 x 512 tokens
        B: the shape of SmolLM2-135M, see bench_sample; rows 4 x 256 tokens

The workload is one that any other trainer can be given: random ids, one document a row, fused AdamW. The last line is
JSON; ratios measured in turn on one machine count, absolute speeds do not. `gemm_share` is what the step reaches of the
rate of one large matrix product on the same machine, counting `GPT.training_flops`.

What bounds the step in bfloat16 on one core with AMX, torch 2.13 (profile of 2026-11-25, share of the time):

                     mm    attention forward, backward   elementwise products   copies   log-softmax   AdamW
    S eager          21%   4%, 20%                       20%                    11%      7%            1%
    S compiled       32%   7%, 31%                       27% in fused kernels                          1%
    M eager          36%   2%, 12%                       7%                     10%      12%           2%
    M compiled       45%   3%, 14%                       34% in fused kernels                          3%

Tried at S in turn, eager: bmm + softmax for attention 1.07 x (compiled: S 1.10, M .97), one matrix for q, k, v 1.02,
for gate and up .95, a bfloat16 residual stream 1.00, loss in slabs 1.00, no clipping 1.01. What gained: malloc that
keeps freed memory 1.1 x eager, 1.19 compiled (`keep_freed_memory`), torch.compile 1.4 x at S and 1.2 at M and B.
Compiling takes 15 to 65 s (S), 40 s (M), 210 s (B) with an empty cache.
"""
import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from data.alchemy import prepare
from data.cache import TokenizedCorpus, open_source, vocabulary
from data.layout import TEXT, Layout
from data.loader import Batch, Position, Recipe, StepBatch, training_batches
from data.run import Ranks, start_ranks
from data.tokens import tokenizer_of
from model import GPT, GPTConfig
from tests.bench_sample import SIZES
from train import Forward, TrainConfig, make_optimizers, train_step

ROWS = {"S": (16, 256), "M": (4, 512), "B": (4, 256)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(job, device: torch.device, repeats: int) -> list[float]:
    """Of each call of job(), after one to warm up."""
    job()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        job()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def gemm_flops(tokens: int, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of the product of a batch of hidden states with a matrix of an MLP."""
    x = torch.randn(tokens, config.width, device=device, dtype=dtype)
    w = torch.randn(config.width, config.ffn, device=device, dtype=dtype)
    return 2 * tokens * config.width * config.ffn / min(seconds_of(lambda: x @ w, device, 10))


def step(args, ranks: Ranks) -> dict:
    """Optimizer steps as train.py takes them."""
    rows, length = args.rows or ROWS[args.size][0], args.length or ROWS[args.size][1]
    model = GPT(GPTConfig(context=length, tied=True, embedding_std=0.02, **SIZES[args.size])).to(ranks.device)
    config = TrainConfig(steps=1000, batch_tokens=rows * length, row_tokens=length, optimizer=args.optimizer,
                         learning_rate=3e-4)
    optimizers = make_optimizers(model, config, ranks.device)
    forward = Forward(model, args.dtype, args.compile, ranks)

    def job():
        ids = torch.randint(model.config.vocab_size, (rows, length))[ranks.rank::ranks.world]
        batch = Batch(ids, ids, torch.zeros_like(ids), torch.full_like(ids, TEXT))
        batch = StepBatch(batch, rows * length, rows * length, rows * length, 0, Position())
        train_step(model, forward, optimizers, batch, 1.0, config, ranks)
    speeds = [rows * length / seconds for seconds in seconds_of(job, ranks.device, args.repeats)]
    peak = gemm_flops(rows * length // ranks.world, model.config, getattr(torch, args.dtype), ranks.device)
    speed = statistics.median(speeds)
    return dict(tokens_per_second=round(speed, 1), low=round(min(speeds), 1), high=round(max(speeds), 1),
                gemm_gflops=round(peak / 1e9, 1), world=ranks.world,
                gemm_share=round(speed / ranks.world * model.training_flops(length) / peak, 3))


def resident_mib() -> int:
    """Memory of this process now, on Linux."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2 ** 20


def corpus(args, ranks: Ranks) -> dict:
    """The embedded documents over and over, a file of so many gigabytes: tokenised, opened again, read for --steps."""
    with tempfile.TemporaryDirectory() as folder:
        prepare.main(["--out", folder])
        with open(f"{folder}/oracle.jsonl", "rb") as source, open(f"{folder}/large.jsonl", "wb") as file:
            lines, size = source.read(), int(args.gigabytes * 1e9)
            while file.tell() < size:
                file.write(lines)
        report, clock = {"mib_before": resident_mib()}, time.perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            report[f"seconds_{name}"], report[f"mib_{name}"] = round(time.perf_counter() - clock, 1), resident_mib()
            clock = time.perf_counter()
        source = open_source(f"{folder}/large.jsonl")
        lap("survey")
        tokenizer = tokenizer_of(vocabulary(source, "words"), "words")
        lap("vocabulary")
        TokenizedCorpus(source, tokenizer)
        lap("tokenize")
        documents = TokenizedCorpus(open_source(f"{folder}/large.jsonl"), tokenizer)
        lap("open_again")
        batches, tokens = training_batches(documents, Layout(tokenizer), Recipe(16384, 256), Position(), ranks), 0
        next(batches)
        lap("first_batch")
        for number, batch in enumerate(itertools.islice(batches, args.steps), 1):
            tokens += batch.num_tokens
            if number % (args.steps // 4) == 0:
                lap(f"steps_{number}")
        seconds = sum(value for name, value in report.items() if name.startswith("seconds_steps"))
        on_disk = sum(path.stat().st_size for path in Path(f"{folder}/large.jsonl.tokens").iterdir())
        return report | {"documents": len(documents), "tokenised_mb": on_disk // 10 ** 6,
                         "tokens_per_second": round(tokens / seconds)}


def main() -> None:
    jobs = {"step": step, "corpus": corpus}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", choices=jobs, default="step")
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of corpus")
    parser.add_argument("--steps", type=int, default=400, help="batches of corpus")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ranks = start_ranks(args.device)
    result = jobs[args.job](args, ranks)
    ranks.say(json.dumps(dict(trainer="nanoBoLT", torch=torch.__version__, **result, **vars(args))))


if __name__ == "__main__":
    main()
