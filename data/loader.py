"""Batches for training: documents laid out afresh each epoch, packed into rows, dealt to steps and ranks.

A batch is a function of (documents, settings, seed, step) alone, so a resumed run sees what the uninterrupted one saw.
"""
import itertools
from dataclasses import dataclass, replace
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from data.corpus import Chunk, Document
from data.layout import GIVEN, TEXT, Layout, Sequence
from data.run import random_stream


@dataclass(frozen=True)
class Batch:
    """Packed rows, each (R, T): ids, the id that follows (-1: no target), document numbers, and the target's kind."""
    ids: Tensor
    targets: Tensor
    document: Tensor
    kinds: Tensor

    def rows(self, part: slice) -> "Batch":
        return Batch(self.ids[part], self.targets[part], self.document[part], self.kinds[part])

    def to(self, device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in
                       (self.ids, self.targets, self.document, self.kinds)))

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.document >= 0).sum())

    @property
    def num_targets(self) -> int:
        return int((self.targets >= 0).sum())

    @property
    def num_observed(self) -> int:
        """Targets that are observed text: what models with and without latents are compared on."""
        return int((self.kinds == TEXT).sum())


def pick_thought(chunk: Chunk, uniform: float) -> Chunk:
    """The chunk with one of the thoughts that an E-step kept, by weight; a chunk without them is left as it is."""
    if not chunk.draws:
        return chunk
    cdf = np.cumsum(chunk.weights)
    return replace(chunk, latent=chunk.draws[int(np.searchsorted(cdf, uniform * cdf[-1], side="right"))])


def lay_out_epoch(documents: list[Document], layout: Layout, plain_as: str, seed: int, epoch: int) -> Iterator[Sequence]:
    """The documents in a fresh order with fresh coins, one fair coin per chunk, and where there are several thoughts a fresh one."""
    ends = np.cumsum([len(document.chunks) for document in documents])
    coins = np.split(random_stream(seed, "coin", epoch).random(ends[-1]) < 0.5, ends[:-1])
    picks = np.split(random_stream(seed, "pick", epoch).random(ends[-1]), ends[:-1])
    for place in random_stream(seed, "shuffle", epoch).permutation(len(documents)):
        document = documents[place]
        chunks = [pick_thought(chunk, pick) for chunk, pick in zip(document.chunks, picks[place])]
        yield layout.document(replace(document, chunks=chunks), coins[place], plain_as)


def windows(sequence: Sequence, row_tokens: int) -> Iterator[Sequence]:
    """A sequence as it is where it fits a row, else cut into windows that overlap by the one id that must be seen."""
    for start in range(0, max(1, len(sequence.ids) - 1), row_tokens):
        stop = start + row_tokens + 1
        yield Sequence(sequence.ids[start:stop], sequence.kinds[start:stop])


def pack(sequences: Iterator[Sequence], row_tokens: int, open_rows: int = 16) -> Iterator[list[Sequence]]:
    """Rows of sequences that fit together: each goes into the fullest of a few open rows that has room for it.

    A sequence of n ids takes n - 1 positions, since its last id is only a target.
    """
    rows: list[list[Sequence]] = []
    room: list[int] = []
    for sequence in sequences:
        need = len(sequence.ids) - 1
        fitting = [i for i in range(len(rows)) if room[i] >= need]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            rows[best].append(sequence)
            room[best] -= need
            continue
        if len(rows) == open_rows:
            fullest = room.index(min(room))
            yield rows.pop(fullest)
            room.pop(fullest)
        rows.append([sequence])
        room.append(row_tokens - need)
    yield from rows


def collate(rows: list[list[Sequence]], row_tokens: int) -> Batch:
    """Rows of sequences as tensors. Padding has id 0, no target, and a document number of its own."""
    shape = (len(rows), row_tokens)
    ids, kinds = np.zeros(shape, np.int64), np.full(shape, GIVEN, np.int64)
    targets, document = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    for r, row in enumerate(rows):
        at = 0
        for number, sequence in enumerate(row):
            here, next_kinds = slice(at, at + len(sequence.ids) - 1), np.array(sequence.kinds[1:])
            ids[r, here], kinds[r, here], document[r, here] = sequence.ids[:-1], next_kinds, number
            targets[r, here] = np.where(next_kinds == GIVEN, -1, sequence.ids[1:])
            at = here.stop
    return Batch(*map(torch.from_numpy, (ids, targets, document, kinds)))


def training_batches(documents: list[Document], layout: Layout, *, plain_as: str, rows: int, row_tokens: int,
                     seed: int, start: int = 0) -> Iterator[Batch]:
    """The endless stream of global batches of `rows` rows from step `start` on; rows an epoch leaves start the next."""
    def stream():
        for epoch in itertools.count():
            sequences = lay_out_epoch(documents, layout, plain_as, seed, epoch)
            yield from pack((w for s in sequences for w in windows(s, row_tokens)), row_tokens)

    packed = itertools.islice(stream(), start * rows, None)
    while True:
        yield collate(list(itertools.islice(packed, rows)), row_tokens)


def length_batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Places of things of like length, longest first: batches that, padded, have at most so many tokens, an eighth padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest, rows = lengths[order[0]], 1
        while rows < len(order) and (rows + 1) * longest <= tokens and lengths[order[rows]] >= 7 / 8 * longest:
            rows += 1
        yield order[:rows]
        order = order[rows:]


def padded(sequences: list[Sequence]) -> Batch:
    """One sequence a row."""
    return collate([[sequence] for sequence in sequences], max(len(sequence.ids) for sequence in sequences) - 1)


def summed_log_probs(model, batch: Batch, cache=None) -> Tensor:
    """Sum of the log-probabilities of each row's targets, (R,) float32 nats. The vocabulary matters at targets only."""
    hidden, scored = model.hidden(batch.ids, cache=cache), batch.targets >= 0
    log_p = torch.zeros(batch.targets.shape, device=hidden.device)
    log_p[scored] = model.log_probs(hidden[scored], batch.targets[scored])
    return log_p.sum(dim=-1)


@torch.inference_mode()
def score_sequences(model, sequences: list[Sequence], batch_tokens: int) -> Tensor:
    """The log-probability of the tokens of each sequence that are not given, (len(sequences),) float32 nats, on the CPU.

    What evaluations without thoughts come from; the E-step scores its joints after shared prompts.
    """
    device, log_p = next(model.parameters()).device, torch.zeros(len(sequences))
    for places in length_batches([len(sequence.ids) for sequence in sequences], batch_tokens):
        log_p[places] = summed_log_probs(model, padded([sequences[i] for i in places]).to(device)).cpu()
    return log_p
