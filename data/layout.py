"""The one joint sequence: every token that is trained on, sampled from or scored is laid out here.

    document   BOS chunk chunk ... EOS                  a chunk is one of
    prior      SOL PRIOR z EOL x                        trains p(z | C) and p(x | z, C)
    posterior  SOL EOL x SOL POST z EOL                 trains p(x | C) without a thought, and q(z | x, C)
    plain      x                                        a chunk without a latent
    no-thought SOL EOL x                                a plain chunk, told that there is no thought

    raw        BOS x x ... EOS                          the text alone: a plain language model
    latents    BOS z z ... EOS                          the thoughts alone, as synthetic text

    sampling   BOS C SOL EOL x SOL POST  ->  z EOL      log_proposal counts z and EOL
    scoring    BOS C SOL PRIOR  z EOL x                 log_joint counts z, EOL and x

x is a chunk's observed text (its suffix), z its thought (its latent), C the observed text of up to three chunks before,
fewer where a sequence would not fit the model.
Pieces are encoded apart and their ids concatenated, so training, sampling, scoring and evaluation see the same ids.
"""
from dataclasses import dataclass, field

from data.corpus import Document
from data.tokens import BOS, EOL, EOS, POST, PRIOR, SOL, Tokenizer

GIVEN, MARKER, LATENT, TEXT = range(4)      # the kind of a token; GIVEN ones are seen, but not trained on or scored
CONTEXT_CHUNKS = 3                          # C is the text of at most so many chunks, the paper's rule


@dataclass
class Sequence:
    """Ids with the kind of each."""
    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def add(self, kind: int, ids: list[int]) -> "Sequence":
        self.ids += ids
        self.kinds += [kind] * len(ids)
        return self

    def after(self, given: list[int]) -> "Sequence":
        """The sequence with ids before it that are seen, but neither trained on nor scored."""
        return Sequence([*given, *self.ids], [GIVEN] * len(given) + self.kinds)


class Layout:
    """Builds every sequence of the project for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, context: int = 2 ** 40, max_latent_tokens: int = 0):
        """context: the tokens that the model takes, of which the longest thought has so many; training needs neither.
        Raises ValueError where nothing is left for text."""
        self.tokenizer, self.room = tokenizer, context - max_latent_tokens - 5      # for C and x, beside five markers
        if self.room < 1:
            raise ValueError(f"thoughts of {max_latent_tokens} tokens leave no room for text in a context of {context};"
                             " lower --max_latent_tokens, or train with a larger --model.context")
        self.bos, self.eos, self.sol, self.eol, self.prior, self.post = (
            tokenizer.marker[name] for name in (BOS, EOS, SOL, EOL, PRIOR, POST))

    def fits(self, document: Document, chunk: int) -> bool:
        """Whether there is room for a chunk and its longest thought, if need be without C."""
        return len(document.chunks[chunk].suffix) <= self.room

    def context(self, document: Document, chunk: int, text_tokens: int | None = None) -> list[int]:
        """BOS C: the observed text of up to CONTEXT_CHUNKS chunks before, without latents.

        Where there is no room for them beside the text of the chunk (or so many tokens) and its longest thought, C has
        fewer, the oldest gone first. Sampling, scoring and evaluation condition on that C alike: the evidence is of
        log p(x | that C).
        """
        room = self.room - (len(document.chunks[chunk].suffix) if text_tokens is None else text_tokens)
        before: list[int] = []
        for other in reversed(document.chunks[max(0, chunk - CONTEXT_CHUNKS):chunk]):
            if len(other.suffix) + len(before) > room:
                break
            before = other.suffix + before
        return [self.bos] + before

    # training

    def document(self, document: Document, coins, plain_as: str = "plain") -> Sequence:
        """The training sequence of a document; coins[c] True lays chunk c out as prior, False as posterior, and None
        without its latent."""
        sequence = Sequence().add(GIVEN, [self.bos])
        for chunk, coin in zip(document.chunks, coins, strict=True):
            if chunk.given:
                sequence.add(GIVEN, chunk.suffix)
            elif chunk.latent is None or coin is None:
                sequence.add(MARKER, [self.sol, self.eol] if plain_as == "no_thought" else []).add(TEXT, chunk.suffix)
            elif coin:
                sequence.add(MARKER, [self.sol, self.prior])
                sequence.add(LATENT, chunk.latent).add(MARKER, [self.eol]).add(TEXT, chunk.suffix)
            else:
                sequence.add(MARKER, [self.sol, self.eol]).add(TEXT, chunk.suffix)
                sequence.add(MARKER, [self.sol, self.post]).add(LATENT, chunk.latent).add(MARKER, [self.eol])
        return sequence.add(MARKER, [self.eos])

    def raw(self, document: Document) -> Sequence:
        """The text of a document alone, as a plain language model is trained on it."""
        return self.document(document, [None] * len(document.chunks))

    def latents(self, document: Document) -> Sequence:
        """The latents of a document alone, without markers between them: for corpora whose latents rewrite the text.
        Those of given chunks are left out, as in every other layout."""
        sequence = Sequence().add(GIVEN, [self.bos])
        for chunk in document.chunks:
            sequence.add(LATENT, [] if chunk.given else chunk.latent or [])
        return sequence.add(MARKER, [self.eos])

    # E-step and evaluation

    def posterior_prompt(self, document: Document, chunk: int) -> list[int]:
        """BOS C SOL EOL x SOL POST: what q(z | x, C) is sampled from."""
        return [*self.context(document, chunk), self.sol, self.eol, *document.chunks[chunk].suffix, self.sol, self.post]

    def thought_and_text(self, document: Document, chunk: int, latent: list[int]) -> Sequence:
        """z EOL x: what follows the prior prompt; the sum over all of it is log p(z, x | C)."""
        return Sequence().add(LATENT, latent).add(MARKER, [self.eol]).add(TEXT, document.chunks[chunk].suffix)

    def prior_prompt(self, document: Document, chunk: int, text_tokens: int | None = None) -> list[int]:
        """BOS C SOL PRIOR: what p(z | C) is sampled from; text_tokens: see `context`."""
        return [*self.context(document, chunk, text_tokens), self.sol, self.prior]

    def direct_prompt(self, document: Document, chunk: int, no_thought: bool,
                      text_tokens: int | None = None) -> list[int]:
        """BOS C [SOL EOL]: what x is written after where there is no thought."""
        return self.context(document, chunk, text_tokens) + [self.sol, self.eol] * no_thought
