"""What a model knows of held-out text: nats without a thought, bounds with thoughts, answers.

So bolt.py evaluates its models, and with `--evaluate CKPT --data FILE` any other one.
"""
import itertools
import json
import math
from dataclasses import dataclass
from functools import partial

import torch

from data.alchemy import claims
from data.alchemy.world import World
from data.corpus import Document, read_documents
from data.layout import TEXT, Layout, Sequence
from data.report import mean, per_unit
from data.run import Ranks
from data.tokens import tokenizer_from
from model import GPT, restore
from sample_latents import (Evidence, Place, SampleConfig, at_precision, complete, count_room, figures_of,
                            importance_bound, infer, observed_places, score, settled_sample, sums_of)


# ---- what is measured on ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class HeldOut:
    """Documents of which some text has room, and how they are measured: `sample` has the thoughts a chunk for the
    bound; probes, of the embedded corpus, are for its hidden facts, and world is its table, else None."""
    layout: Layout
    documents: list[Document]
    sample: SampleConfig
    probes: list[Document]
    world: World | None


def observed_tokens(document: Document) -> int:
    return sum(len(chunk.suffix) for chunk in document.chunks if not chunk.given)


def held_out_of(documents: list[Document], path: str, layout: Layout, sample: SampleConfig,
                probes: list[Document] = [], world: World | None = None) -> tuple[HeldOut, dict]:
    """What of some documents counts, and how many chunks had no room. Raises ValueError where nothing does."""
    room = count_room(layout, observed_places(Layout(layout.tokenizer), *documents))
    counted = [document for document in documents
               if any(d.chunks[c].suffix for d, c in observed_places(layout, document))]
    if not counted:
        raise ValueError(f"{path} has no text to predict; every chunk is given, empty, or too long")
    return HeldOut(layout, counted, sample, probes, world), room


# ---- nats and answers ------------------------------------------------------------------------------------------

def per_document(places: list[Place], values: list[float]) -> list[float | None]:
    """Sums of a value of chunks over their documents; None where it is infinite."""
    sums: dict[int, float] = {}
    for (document, _), value in zip(places, values, strict=True):
        sums[document.index] = sums.get(document.index, 0) + value
    return [value if math.isfinite(value) else None for value in sums.values()]


def nll_after(model: GPT, places: list[Place], prompts: list[list[int]], progress=lambda n: None) -> list[float | None]:
    """-log p of the texts of chunks, each after its prompt, nats per document."""
    texts = [Sequence().add(TEXT, document.chunks[c].suffix) for document, c in places]
    return per_document(places, (-score(model, prompts, range(len(prompts)), texts, progress)).tolist())


def bounds(places: list[Place], evidence: Evidence) -> dict:
    """K-sample bounds from the same draws, taken in groups of K, as nats of a document, positive; and the elbo of the
    draws that finished, per observed token."""
    log_w, finished = evidence.log_weights, evidence.finished                                 # (N, K)
    tokens = torch.tensor([len(document.chunks[c].suffix) for document, c in places])[:, None]
    elbo = (log_w[finished].sum() / (tokens * finished).sum()).item()
    scores = {"elbo_per_token": elbo if finished.any() else None}
    for draws in sorted({4, log_w.shape[1]}):
        if log_w.shape[1] % draws == 0:
            groups = importance_bound(log_w.view(len(log_w), -1, draws))                      # (N, K / draws)
            scores[f"nll_by_{draws}"] = per_document(places, (-groups.mean(dim=-1)).tolist())
    return scores | {"nll": scores[f"nll_by_{log_w.shape[1]}"]}


def final_answer(text: str) -> str:
    """What an answer comes to: what follows "####" where the text has it, without full stop."""
    return text.split("####")[-1].strip(" .\n")


def answers_right(held_out: HeldOut, model: GPT, documents: list[Document], mode: str,
                  progress=lambda n: None) -> list[bool]:
    """Whether the greedy answer in the last chunk is the document's. mode: thought, no_thought or raw.

    Answers of like length are written together: a long one takes no room from the C of the others.
    """
    layout, sample, thinks, right = held_out.layout, held_out.sample, mode == "thought", {}
    prompt = layout.prior_prompt if thinks else partial(layout.direct_prompt, no_thought=mode == "no_thought")

    def room_for(index: int) -> int:
        return min(layout.room, 2 ** (len(documents[index].chunks[-1].suffix) + 1).bit_length())
    for room, group in itertools.groupby(sorted(range(len(documents)), key=room_for), room_for):
        group = list(group)
        prompts = [prompt(documents[i], len(documents[i].chunks) - 1, text_tokens=room) for i in group]
        if thinks:      # a thought that reaches its cap is closed there, since an answer is wanted all the same
            thoughts = complete(model, layout, prompts, [layout.eol], sample.max_latent_tokens, sample.rows, progress)
            prompts = [[*prompt, *thought, layout.eol] for prompt, thought in zip(prompts, thoughts)]
        answers = complete(model, layout, prompts, [layout.eos, layout.sol], room, sample.rows, progress)
        right |= {i: final_answer(layout.tokenizer.decode(ids)) == documents[i].record.get("answer")
                  for i, ids in zip(group, answers)}
    return [right[i] for i in range(len(documents))]


# ---- one model -------------------------------------------------------------------------------------------------

def evaluate(held_out: HeldOut, model: GPT, title: str, ranks: Ranks, thinks: bool = True, weigh: bool = True) -> dict:
    """Everything measured of a model on held-out documents; lists have an entry per document.

    tokens, bytes: observed. correct, in corpora with answers: greedy answer right (a model that thinks writes its
    thought first); correct_direct: without a thought. nll: nats of the observed text, positive: minus the K-sample
    bound of a model that thinks, else exact; None where every draw was unfinished; nll_given: after the document's own
    thoughts, of the documents that have some, and tokens_given of their chunks. drawn: figures of the draws. hidden,
    known: see data/alchemy/claims.py. With weigh=False nothing is drawn.
    """
    layout, documents, probes, world = held_out.layout, held_out.documents, held_out.probes, held_out.world
    model, places = at_precision(model, held_out.sample.dtype), observed_places(layout, *documents)
    told = [(document, c) for document, c in places if document.chunks[c].latent]
    draws, records = held_out.sample.num_latents * (thinks and weigh), [document.record for document in documents]
    has_answers = all("answer" in record for record in records)
    total = len(places) * (1 + 2 * draws) + len(told) + (len(documents) * (1 + 2 * thinks)) * has_answers
    with ranks.bar(total + len(probes) * (1 + thinks), f"{title} evaluation") as bar:
        right = partial(answers_right, held_out, model, progress=bar.update)
        scores = {"tokens": per_document(places, [len(d.chunks[c].suffix) for d, c in places]),
                  "bytes": per_document(places, [len(d.record["chunks"][c]["suffix"].encode()) for d, c in places]),
                  "hidden": [record.get("hidden") if world else None for record in records]}
        prompts = [layout.direct_prompt(*place, no_thought=thinks) for place in places]
        scores["nll"] = scores["nll_direct"] = nll_after(model, places, prompts, bar.update)
        if told:
            prompts = [[*layout.prior_prompt(d, c), *d.chunks[c].latent, layout.eol] for d, c in told]
            scores["nll_given"] = nll_after(model, told, prompts, bar.update)
            scores["tokens_given"] = per_document(told, [len(d.chunks[c].suffix) for d, c in told])
        if has_answers:
            scores["correct_direct"] = right(documents, "no_thought" if thinks else "raw")
            scores["correct"] = right(documents, "thought") if thinks else scores["correct_direct"]
        if probes:
            scores["known"] = claims.facts_known(probes, right(probes, "thought" if thinks else "raw"))
        if draws:
            evidence = infer(model, layout, places, held_out.sample, 0, bar.update)
            scores |= bounds(places, evidence) | {"drawn": figures_of(sums_of(evidence))}
            if world:
                thoughts = [[layout.tokenizer.decode(ids) for ids in latents] for latents in evidence.latents]
                scores |= claims.thought_quality(world, places, thoughts, evidence.weights.tolist())
    return scores


def evaluate_alone(state: dict, title: str, path: str, sample: SampleConfig, ranks: Ranks) -> None:
    """Print what `evaluate` finds of the model of a checkpoint on one file, as JSON: means over its documents."""
    tokenizer, sample = tokenizer_from(state["tokenizer"]), settled_sample(sample, state["model_config"], ranks)
    layout = Layout(tokenizer, state["model_config"].context, sample.max_latent_tokens)
    documents = read_documents(path, tokenizer, sample.chunk_tokens)
    held_out, room = held_out_of(documents, path, layout, sample)
    model = at_precision(restore(state, ranks.device), sample.dtype)
    places = observed_places(layout, *held_out.documents)
    scores = evaluate(held_out, model, title, ranks)
    raw = nll_after(model, places, [layout.direct_prompt(*place, no_thought=False) for place in places])
    nats = {"nll_text": raw, "nll_no_thought": scores["nll_direct"], "nll_bound": scores["nll"]}
    shares = {"accuracy": "correct", "accuracy_no_thought": "correct_direct"}
    figures = {"documents": len(held_out.documents), "tokens": sum(scores["tokens"])}
    figures |= {name: per_unit(nll, scores["tokens"]) for name, nll in nats.items()}
    figures |= {"nll_given": per_unit(scores["nll_given"], scores["tokens_given"])} if "nll_given" in scores else {}
    figures |= {name: mean(scores[key]) for name, key in shares.items() if key in scores}
    figures = {name: None if value != value else value for name, value in figures.items()}       # JSON has no nan
    ranks.say(json.dumps(figures | scores["drawn"] | room, indent=1))
