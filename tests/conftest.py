"""Small models and corpora that the tests share. Tests marked slow run where RUN_SLOW=1, as in CI."""
import contextlib
import os
import resource

import pytest
import torch

from data.corpus import CHUNK_TOKENS, Document, encode_document
from data.layout import GIVEN, Layout
from data.run import Ranks
from data.tokens import Tokenizer, split
from model import GPT, GPTConfig


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: kill and soak tests, run where RUN_SLOW=1")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if os.environ.get("RUN_SLOW") != "1":
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; RUN_SLOW=1 runs it"))


def random_model(vocab_size: int, seed: int = 0, **shape) -> GPT:
    """A small model with a head that is not zero, so that its distribution is not uniform."""
    small = {"vocab_size": vocab_size, "context": 64, "width": 32, "ffn": 48, "heads": 4, "kv_heads": 2}
    model, generator = GPT(GPTConfig(**(small | shape)), seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=generator) * 0.2)
    return model


def tokenizer_for(texts, encoding: str) -> Tokenizer:
    """The tokenizer that knows just the tokens of some texts."""
    return Tokenizer(encoding, tuple(sorted({token for text in texts for token in split(text, encoding)})))


def encode_corpus(records: list[dict], tokenizer: Tokenizer, chunk_tokens: int = CHUNK_TOKENS) -> list[Document]:
    return [encode_document(i, record, tokenizer, chunk_tokens) for i, record in enumerate(records)]


@contextlib.contextmanager
def full_disk(room: int):
    """No file grows over so many bytes in here."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


RECORDS = [
    {"text": "a b c", "chunks": [{"suffix": "a b", "given": True}, {"suffix": " c", "latent": " d e"}]},
    {"text": "a a c d", "chunks": [{"suffix": "a a", "latent": None}, {"suffix": " c d", "latent": " b"}]},
    {"text": "b d", "chunks": [{"suffix": "b d", "latent": None}]},
    {"text": "a e b c c", "chunks": [{"suffix": "a e b", "given": True}, {"suffix": " c c", "latent": ""}]},
]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tokenizer_for(["a b c d e", " a", "b"], "words")


@pytest.fixture
def layout(tokenizer) -> Layout:
    return Layout(tokenizer)


@pytest.fixture
def documents(tokenizer):
    return [encode_document(i, record, tokenizer) for i, record in enumerate(RECORDS)]


@pytest.fixture
def alone() -> Ranks:
    return Ranks(0, 1, torch.device("cpu"))


def graphs_compiled() -> int:
    """Of this process, by torch.compile, so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def log_prob_of(model, sequence) -> float:
    """The log-probability of what is not given in a sequence, from one uncached pass: what the engine is held
    against."""
    ids, kinds = torch.tensor([sequence.ids]), torch.tensor([sequence.kinds])
    return model(ids[:, :-1], ids[:, 1:].where(kinds[:, 1:] != GIVEN, -1)).sum().item()
