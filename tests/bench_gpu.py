"""Every CUDA path against the CPU's numbers, then speeds with their share of the card's: about two minutes on a GPU.

    python -m tests.bench_gpu                  a line per check and per speed; the last line says what fell short
    python -m tests.bench_gpu --device cpu     the same code, small, on a CPU: only to see that it runs

Compiled training in float32 and bfloat16 with attention by blocks, recorded decoding, scoring after shared prompts, the
bfloat16 copy of the model; then training, sampling and scoring of a model of 124 million parameters in bfloat16.
"""
import argparse
import copy
import sys
import time
from types import SimpleNamespace

import torch

import sample_latents
from data.layout import TEXT, Sequence
from data.loader import Batch, Position, StepBatch
from data.run import start_ranks
from model import GPT, GPTConfig
from sample_latents import at_precision, generate, score, uniform_numbers
from train import PEAK_FLOPS, Forward, TrainConfig, make_optimizers, train_step

SMALL = GPTConfig(vocab_size=300, context=512, layers=2, width=128, heads=4, kv_heads=2, ffn=256, rope_base=10000.0)
LARGE = GPTConfig(vocab_size=50304, context=1024, layers=12, width=768, heads=12, kv_heads=12, ffn=2048,
                  rope_base=10000.0, tied=True, embedding_std=0.02)


class Report:
    """Prints each figure as it comes, and remembers which fell short."""

    def __init__(self):
        self.short: list[str] = []

    def check(self, name: str, value: float, limit: float) -> None:
        """A difference that may be `limit` at most."""
        self.line(name, f"{value:.2e} (at most {limit:.0e})", value <= limit)

    def speed(self, name: str, tokens_per_second: float, share: float | None, goal: float, of: str) -> None:
        known = share is not None
        shown = f", {share:.0%} of {of} (goal {goal:.0%})" if known else f", share of {of} unknown"
        self.line(name, f"{tokens_per_second:,.0f} tokens/s{shown}", not known or share >= goal)

    def line(self, name: str, text: str, good: bool) -> None:
        print(f"{'  ' if good else '! '}{name:48s} {text}", flush=True)
        self.short += [] if good else [f"{name}: {text}"]


def packed(config: GPTConfig, rows: int, tokens: int, device, seed: int = 0) -> Batch:
    """Rows of several documents each, of random ids that all count as text."""
    ids = torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    document = torch.arange(tokens) // torch.tensor([[tokens // (2 + row % 5)] for row in range(rows)])
    return Batch(ids, ids.roll(-1, 1), document, torch.full_like(ids, TEXT)).to(device)


def with_a_head(config: GPTConfig) -> GPT:
    """A model whose distribution is not uniform."""
    model = GPT(config)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def far(ours, theirs) -> float:
    """The largest difference, relative to the size of the reference."""
    return max(((a.float().cpu() - b.float().cpu()).norm() / b.float().norm().clamp(min=1e-9).cpu()).item()
               for a, b in zip(ours, theirs, strict=True))


def check_training(report: Report, ranks, compile: bool) -> None:
    """Gradients of one packed batch: compiled on the device, against eager on the CPU in float32."""
    reference = with_a_head(SMALL)
    for dtype, limit in (("float32", 1e-3), ("bfloat16", 5e-2)):
        model, gradients = copy.deepcopy(reference).to(ranks.device), []
        for network, call, device in ((reference, reference, torch.device("cpu")),
                                      (model, Forward(model, dtype, compile, ranks), ranks.device)):
            network.zero_grad()
            part = packed(SMALL, 4, 512, device)
            (-call(part.ids, part.targets, part.document).mean()).backward()
            gradients.append([weight.grad for weight in network.parameters()])
        report.check(f"gradients, {dtype}" + ", compiled, by blocks" * compile, far(gradients[1], gradients[0]), limit)


def check_sampling(report: Report, device: torch.device) -> None:
    """Recorded steps against called ones, the device's draws and scores against the CPU's, bfloat16 against float32."""
    reference = with_a_head(SMALL)
    model = copy.deepcopy(reference).to(device)
    prompts = [[n % 300] * (3 + n % 40) for n in range(24)]
    uniforms, arguments = uniform_numbers(0, "gpu", (), (24, 8, 100)), dict(stop=[7], banned=[1, 2], rows=64)
    recorded = generate(model, prompts, uniforms, **arguments)
    record = sample_latents.record
    sample_latents.record = lambda job, pool: SimpleNamespace(replay=job, pool=lambda: None)
    called = generate(model, prompts, uniforms, **arguments)        # the same shapes, without a graph
    sample_latents.record = record
    on_cpu = generate(reference, prompts, uniforms, **arguments)
    same = [sum(a != b for a, b in zip(recorded.ids, other.ids)) / len(recorded.ids) for other in (called, on_cpu)]
    report.check("draws that a recorded step changes", same[0], 0.0)
    report.check("draws that differ from the CPU's, float32", same[1], 0.03)
    owners, texts = [n for n in range(24) for _ in range(8)], [Sequence().add(TEXT, ids) for ids in recorded.ids]
    exact, ours, low = (score(m, prompts, owners, texts) for m in (reference, model, at_precision(model, "bfloat16")))
    report.check("log p after shared prompts, float32, nats", (ours - exact).abs().max().item(), 1e-2)
    per_token = ((low - exact).abs() / torch.tensor([max(1, len(ids)) for ids in recorded.ids])).mean().item()
    report.check("log p in bfloat16, nats per token", per_token, 5e-2)


def seconds(job, device: torch.device, repeats: int = 5) -> float:
    """The best of a few calls, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def measured_rates(device: torch.device, size: int) -> tuple[float, float]:
    """FLOPs per second of a large bfloat16 product, and bytes per second of a copy."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    flops = 2 * size ** 3 / seconds(lambda: a @ b, device)
    source = torch.empty(size * size * 4, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return flops, 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def speeds(report: Report, ranks, config: GPTConfig, rows: int, prompts: int, compile: bool) -> None:
    """Training, sampling and scoring in bfloat16, with their share of what was measured of the device."""
    device, on_gpu = ranks.device, ranks.device.type == "cuda"
    flops, bandwidth = measured_rates(device, 8192 if on_gpu else 512)
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    datasheet = next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
    print(f"  {name}: {flops / 1e12:.1f} TFLOP/s in a product, {bandwidth / 1e12:.2f} TB/s in a copy")
    model, tokens = GPT(config).to(device), rows * config.context
    settings = TrainConfig(steps=100, batch_tokens=tokens, row_tokens=config.context, optimizer="muon",
                           learning_rate=3e-3)
    optimizers, forward = make_optimizers(model, settings, device), Forward(model, "bfloat16", compile, ranks)
    batch = StepBatch(packed(config, rows, config.context, torch.device("cpu")), tokens, tokens, tokens, 0, Position())
    step = seconds(lambda: train_step(model, forward, optimizers, batch, 1.0, settings, ranks), device)
    rate = model.training_flops(config.context) * tokens / step
    report.speed("training", tokens / step, rate / flops if on_gpu else None, 0.5, "the measured product")
    if datasheet:
        report.speed("training", tokens / step, rate / datasheet, 0.4, "the datasheet")
    low = at_precision(model, "bfloat16")
    asked = [[n % 300] * 200 for n in range(prompts)]
    uniforms = uniform_numbers(0, "gpu", (), (prompts, 8, 128))
    drawn = seconds(lambda: generate(low, asked, uniforms, stop=[], banned=[], rows=prompts * 8), device, repeats=2)
    sizes = sum(weight.numel() * weight.element_size() for weight in low.parameters())
    kept = 2 * 2 * config.layers * config.kv_heads * config.head_size * (prompts * 200 + prompts * 8 * 64)
    floor = 128 * (sizes + kept) / bandwidth
    share = floor / drawn if on_gpu else None
    report.speed("sampling", prompts * 8 * 128 / drawn, share, 0.5, "reading weights and cache")
    owners = [n // 8 for n in range(prompts * 8)]
    texts, read = [Sequence().add(TEXT, [n % 300] * 128) for n in owners], prompts * (200 + 8 * 128)
    scored = seconds(lambda: score(low, asked, owners, texts), device, repeats=2)
    trained = model.training_flops(config.context) * tokens / step
    share = model.training_flops(328) / 3 * read / scored / trained if on_gpu else None
    report.speed("scoring after shared prompts", read / scored, share, 0.8, "training's rate")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device on this machine")
        return
    ranks, report, on_gpu = start_ranks(args.device), Report(), args.device != "cpu"
    check_training(report, ranks, compile=on_gpu)
    with torch.inference_mode():
        check_sampling(report, ranks.device)
    config, rows, prompts = (LARGE, 32, 64) if on_gpu else (SMALL, 2, 4)
    speeds(report, ranks, config, rows, prompts, compile=on_gpu)
    print(f"fell short: {'; '.join(report.short) or 'nothing'}")
    if any("tokens/s" not in line for line in report.short):
        sys.exit(1)


if __name__ == "__main__":
    main()
