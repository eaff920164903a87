"""Open bases in and out: our GPT gives the log-probabilities of transformers, text never makes a special id, markers
are learned at once, and folders are taken or refused by name."""
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="pip install safetensors tokenizers")
tokenizers = pytest.importorskip("tokenizers", reason="pip install safetensors tokenizers")

from safetensors.torch import load_file, save_file  # noqa: E402

import bolt  # noqa: E402
import sample_latents  # noqa: E402
import train  # noqa: E402
from data.bases import BaseTokenizer, config_of, export, lossless, read_base  # noqa: E402
from data.corpus import encode_document  # noqa: E402
from data.layout import Layout  # noqa: E402
from data.tokens import BOS, EOL, EOS, MARKERS, POST, PRIOR, SOL, tokenizer_from  # noqa: E402
from model import read_checkpoint, restore  # noqa: E402
from tests.conftest import full_disk  # noqa: E402

TEXTS = ["The cat sat on 12 mats, and the dog's 3 bones were gone.", "héllo wörld — 日本語 🙂\n\n  two  spaces\ttab",
         "x = (a+b)**2"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROWS = 340          # of the vocabulary; the tokenizer has fewer


# ---- folders as other tools write them -------------------------------------------------------------------------

def byte_level(split: str | None = None):
    """A GPT-2-like tokenizer; with a pattern that of Llama 3."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False) if split is None else pre.Sequence([
        pre.Split(tokenizers.Regex(split), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, show_progress=False,
                                             initial_alphabet=pre.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def smollm2():
    tokenizer = byte_level()
    pre = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    return tokenizer


def qwen2():
    """transformers makes this pre-tokenizer and normaliser for any Qwen2, whatever its file says."""
    tokenizer = byte_level(LLAMA3.replace("{1,3}", ""))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    return tokenizer


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")


def sentence_piece(legacy: bool):
    """As Llama 2's file (a normaliser puts a space before a text), or as newer ones (Metaspace does)."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ["▁", *"abcdehotns", "▁t", "he", "▁the", "▁a", "at", "▁▁"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("a", "t"), ("▁", "▁")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True,
                                                           fuse_unk=True))
    normal, decode = tokenizers.normalizers, tokenizers.decoders
    last = [decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)]
    if legacy:
        tokenizer.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
        tokenizer.decoder = decode.Sequence([decode.Replace("▁", " "), *last])
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        tokenizer.decoder = decode.Sequence([decode.Replace("▁", " "), *last])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


KINDS = {"gpt2": byte_level, "llama3": lambda: byte_level(LLAMA3), "smollm2": smollm2,
         "llama2": lambda: sentence_piece(True), "metaspace": lambda: sentence_piece(False)}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 48,
         "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
         "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "vocab_size": ROWS,
         "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": None,
                "use_sliding_window": False, "sliding_window": 4096, "rms_norm_eps": 1e-5}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}
FAMILIES = {
    "llama": LLAMA, "tied": LLAMA | {"tie_word_embeddings": True},
    "multi-head": LLAMA | {"num_key_value_heads": None},
    "llama3": LLAMA | {"rope_scaling": SCALING, "eos_token_id": [2, 0]},
    "llama3 as transformers 5 writes it": LLAMA | {"rope_parameters": SCALING | {"rope_theta": 900.0}},
    "a head size of its own": LLAMA | {"head_dim": 20}, "odd": LLAMA | {"hidden_size": 36, "intermediate_size": 37},
    "qwen2": QWEN, "qwen2 tied": QWEN | {"tie_word_embeddings": True, "num_key_value_heads": 6},
}


@pytest.mark.parametrize("scaling", [SCALING, {"type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}])
def test_two_ropes_that_differ_are_refused(scaling):
    """As a model card has one add to what transformers 5 wrote."""
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters that differ; keep one"):
        config_of(LLAMA | {"rope_parameters": {"rope_type": "default"}, "rope_scaling": scaling}, Path("config.json"))
    same = config_of(LLAMA | {"rope_parameters": SCALING, "rope_scaling": SCALING}, Path("config.json"))
    assert same.rope_factor == SCALING["factor"]


def tensors_of(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names that transformers gives them."""
    generator, E, F = torch.Generator().manual_seed(seed), config["hidden_size"], config["intermediate_size"]
    D = config.get("head_dim") or E // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * D, (config.get("num_key_value_heads") or config["num_attention_heads"]) * D

    def random(*shape, std=None):
        return torch.randn(shape, generator=generator) * (std or shape[-1] ** -0.5)
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], E, std=0.5),
               "model.norm.weight": 1 + random(E, std=0.1)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors |= {f"{at}{name}_proj.weight": random(*shape) for name, shape in {
            "self_attn.q": (q, E), "self_attn.k": (kv, E), "self_attn.v": (kv, E), "self_attn.o": (E, q),
            "mlp.gate": (F, E), "mlp.up": (F, E), "mlp.down": (E, F)}.items()}
        tensors |= {f"{at}{name}_layernorm.weight": 1 + random(E, std=0.1) for name in ("input", "post_attention")}
        if config["model_type"] == "qwen2":
            tensors |= {f"{at}self_attn.{name}_proj.bias": random(size, std=0.3)
                        for name, size in (("q", q), ("k", kv), ("v", kv))}
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = random(config["vocab_size"], E)
    return tensors


def make_base(folder: Path, config: dict = LLAMA, dtype=torch.float32, tokenizer=byte_level, **changed) -> Path:
    """A folder of a tiny random model. changed: tensors to put in, or to leave out (None)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(config).items()}
    tensors = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return make_base(tmp_path / "bases" / "tiny")


# ---- parity with transformers ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="pip install transformers")


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_those_of_transformers(name, transformers, tmp_path):
    """Ragged lengths, beyond rope's original context too; the markers apart, which the base does not know."""
    folder = make_base(tmp_path / "base", FAMILIES[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = restore(read_base(str(folder)))
    for length in (1, 7, 150):
        ids = torch.randint(ROWS, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = theirs(ids).logits.log_softmax(dim=-1)
            found = ours.logits(ours.hidden(ids))[..., :ROWS].log_softmax(dim=-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama3", "tied", "qwen2"])
def test_the_proposal_of_a_base_is_rescored(name, tmp_path, transformers):
    """log_proposal of the cached sampler is that of uncached passes over what it drew, special ids banned in both."""
    state = read_base(str(make_base(tmp_path / "base", FAMILIES[name])))
    model, layout = restore(state), Layout(tokenizer_from(state["tokenizer"]))
    chunks = [{"suffix": "The cat sat."}, {"suffix": " Gone"}]
    document = encode_document(0, {"text": "The cat sat. Gone", "chunks": chunks}, layout.tokenizer)
    places = sample_latents.places_to_infer(layout, document)
    config = sample_latents.SampleConfig(num_latents=4, max_latent_tokens=40, temperature=0.7)
    drawn = sample_latents.propose(model, layout, places, config, round=0)
    allowed = [i for i in range(ROWS) if i not in layout.tokenizer.special] + [layout.eol]
    for n, ids in enumerate(drawn.ids):
        prompt, given = layout.posterior_prompt(*places[n // 4]), [*ids, *[layout.eol] * bool(drawn.finished[n])]
        assert set(given) <= set(allowed)
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([prompt + given])))[0, len(prompt) - 1:-1]
        log_q = torch.full_like(logits, -math.inf)
        log_q[:, allowed] = (logits[:, allowed] / 0.7).log_softmax(dim=-1)
        assert log_q[range(len(given)), given].sum().item() == pytest.approx(drawn.log_prob[n].item(), abs=1e-4)


@pytest.mark.parametrize("dtype,most", [("float32", 1e-4), ("bfloat16", 0.3)])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_goes_out_loads_in_transformers(name, dtype, most, transformers, tmp_path):
    """Weights and ids of text and markers; what bfloat16 moves is bounded loosely."""
    family, out = FAMILIES[name], str(tmp_path / "out")
    folder = make_base(tmp_path / "base", family, tokenizer=qwen2 if family["model_type"] == "qwen2" else byte_level)
    state = read_base(str(folder))
    ours, tokenizer = restore(state), tokenizer_from(state["tokenizer"])
    checkpoint_of(state, tmp_path / "run")
    export(str(tmp_path / "run"), out, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    read = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer.encode(TEXTS[0]) + [tokenizer.marker[name] for name in MARKERS]
    assert read(TEXTS[0] + "".join(MARKERS))["input_ids"] == ids
    assert theirs.config.vocab_size == tokenizer.vocab_size == len(read) and read.eos_token_id == tokenizer.marker[EOS]
    chat = read.apply_chat_template([{"role": "user", "content": TEXTS[0]}], add_generation_prompt=True, tokenize=False)
    assert chat == BOS + TEXTS[0] + SOL + PRIOR
    with torch.no_grad():
        expected = ours.logits(ours.hidden(torch.tensor([ids]))).log_softmax(dim=-1)
        found = theirs(torch.tensor([ids])).logits.log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=most)


def test_a_tokenizer_that_transformers_would_take_for_qwen2s_is_said_to_be_another(tmp_path):
    """By the splitting of text, which transformers makes itself for that family; the file keeps our ids."""
    for name, tokenizer, is_said in (("own", qwen2, False), ("other", lambda: byte_level(LLAMA3), True)):
        state = read_base(str(make_base(tmp_path / name, FAMILIES["qwen2"], tokenizer=tokenizer)))
        checkpoint_of(state, tmp_path / f"{name}_run")
        note = export(str(tmp_path / f"{name}_run"), str(tmp_path / f"{name}_out"))
        assert ("Qwen2's own splitting" in note) == is_said
        library = tokenizers.Tokenizer.from_file(str(tmp_path / f"{name}_out" / "tokenizer.json"))
        text = "12345 mats, don't sit"
        assert library.encode(text).ids == tokenizer_from(state["tokenizer"]).encode(text)
    assert len({path.stat().st_mode for path in (tmp_path / "own_out").iterdir()}) == 1     # whoever may read one


def checkpoint_of(state: dict, run: Path) -> None:
    run.mkdir()
    bases_model = restore(state)
    train.save_checkpoint(str(run / "ckpt.pt"), bases_model, tokenizer=state["tokenizer"], optimizers=[])


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_full_disk_is_named_and_no_folder_is_left(room, base, tmp_path):
    """Whether a text or the weights have no room."""
    state = read_base(str(base))
    train.save_checkpoint(str(tmp_path / "ckpt.pt"), restore(state), tokenizer=state["tokenizer"], optimizers=[])
    with full_disk(room), pytest.raises(OSError, match="could not write .*out .*make room"):
        export(str(tmp_path / "ckpt.pt"), str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_what_went_out_comes_in_again_with_its_markers(base, tmp_path):
    state = read_base(str(base))
    state["model"]["embedding.weight"][ROWS:ROWS + 6] = torch.arange(6.0)[:, None]      # as if they were trained
    checkpoint_of(state, tmp_path / "run")
    export(str(tmp_path / "run"), f"{tmp_path}/out/", "float32")
    again = read_base(str(tmp_path / "out"))
    assert again["tokenizer"]["text_ids"] == ROWS and again["model_config"] == state["model_config"]
    for name, weight in state["model"].items():
        assert torch.equal(weight, again["model"][name]), name
    assert tokenizer_from(again["tokenizer"]).encode("".join(MARKERS)) == tokenizer_from(state["tokenizer"]).encode(
        "".join(MARKERS))
    with pytest.raises(ValueError, match="out is there already"):
        export(str(tmp_path / "run"), str(tmp_path / "out"))


# ---- tokenizer -------------------------------------------------------------------------------------------------

def ours_and_theirs(kind: str) -> tuple[BaseTokenizer, "tokenizers.Tokenizer"]:
    library = KINDS[kind]()
    return BaseTokenizer(json.dumps(lossless(json.loads(library.to_str()))), ROWS), library


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_encoded_as_the_library_does_and_losslessly(kind):
    """Ids of byte-level files are the library's; pieces of any file decode to themselves, one by one or joined."""
    hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
    ours, library = ours_and_theirs(kind)
    library.encode_special_tokens = True
    library.no_truncation(), library.no_padding()
    texts = hypothesis.strategies.text(
        hypothesis.strategies.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)
    spelled = [*SPECIAL, "</s>", "<s>", SOL, "  ", "\n\n", " the", "123", "é", "🙂"]
    pieces = hypothesis.strategies.sampled_from(spelled)
    mixed = hypothesis.strategies.lists(texts | pieces, max_size=5).map("".join)

    @hypothesis.settings(max_examples=1000, deadline=None, database=None)
    @hypothesis.given(mixed, mixed)
    def holds(a, b):
        one, two = ours.encode(a), ours.encode(b)
        assert ours.decode(one + two) == a + b and ours.decode(one) == a
        assert not {*one, *two} & {*ours.special} and max([*one, *two, 0]) < ROWS
        assert sum(ours.sizes[i] for i in one) == len(a.encode())
        if kind not in ("llama2", "metaspace"):
            assert one == library.encode(a, add_special_tokens=False).ids
        elif a and not a.startswith(" "):       # where the library puts a space before a text
            assert ours.encode(f" {a}") == library.encode(a, add_special_tokens=False).ids
    holds()


def test_markers_and_special_tokens():
    """A tokenizer goes to another process and into a checkpoint; what is no text is known by its ids."""
    import pickle
    ours, _ = ours_and_theirs("gpt2")
    known = ours.library.get_vocab_size()
    assert ours.marker == {name: ROWS + i for i, name in enumerate(MARKERS)} and ours.vocab_size == ROWS + 6
    assert ours.special == [0, 1, 2, *range(known, ROWS)] and len(ours.sizes) == ROWS
    again = pickle.loads(pickle.dumps(ours))
    assert again == ours == tokenizer_from(ours.state()) and again.encode("<|im_end|>") == ours.encode("<|im_end|>")
    assert ours.decode([ROWS + 2, *ours.encode(" é"), ROWS + 3]) == f"{SOL} é{EOL}" and ours.count("") == 0


def test_marker_rows_start_where_they_are_learned_at_once(tmp_path):
    for name, begin in (("llama", 1), ("qwen2", 2)):        # Qwen2 has no first token of a text
        folder = make_base(tmp_path / name, FAMILIES[name])
        state, old = read_base(str(folder)), load_file(folder / "model.safetensors")
        for ours, theirs in (("embedding.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight")):
            rows, base_rows = state["model"][ours], old[theirs]
            row = dict(zip(MARKERS, rows[ROWS:ROWS + 6]))
            assert torch.equal(rows[:ROWS], base_rows) and len(rows) % 64 == 0 and not rows[ROWS + 6:].any()
            assert torch.equal(row[BOS], base_rows[begin])
            assert torch.equal(row[EOS], base_rows[2]) and torch.equal(row[EOL], base_rows[2])
            for marker in (SOL, PRIOR, POST):
                assert 0 < (row[marker] - base_rows.mean(0)).std() < 0.2 * base_rows.std()


# ---- folders as people have them -------------------------------------------------------------------------------

def said(folder) -> tuple[dict, list[str]]:
    lines = []
    return read_base(str(folder), lines.append), lines


TIED = LLAMA | {"tie_word_embeddings": True}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_stale_head_of_a_tied_model_is_left_aside(tmp_path):
    state, lines = said(make_base(tmp_path / "base", TIED, **{HEAD: torch.ones(ROWS, 48)}))
    assert len(lines) == 1 and HEAD in lines[0] and state["model_config"].tied
    assert torch.equal(restore(state).head.weight[:ROWS], tensors_of(TIED)[EMBEDDING])


@pytest.mark.parametrize("tie", [False, None])
def test_a_model_without_a_head_is_tied(tie, tmp_path):
    config = {name: value for name, value in (LLAMA | {"tie_word_embeddings": tie}).items() if value is not None}
    state, lines = said(make_base(tmp_path / "base", config, **{HEAD: None}))
    assert len(lines) == 1 and state["model_config"].tied and restore(state).head.weight is not None


def test_a_head_alone_serves_as_the_embedding(tmp_path):
    head = tensors_of(LLAMA)[HEAD]
    state, lines = said(make_base(tmp_path / "base", TIED, **{HEAD: head, EMBEDDING: None}))
    assert len(lines) == 1 and torch.equal(restore(state).embedding.weight[:ROWS], head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_become_float32_masters(dtype, tmp_path):
    state, lines = said(make_base(tmp_path / "base", dtype=dtype))
    assert not lines and {weight.dtype for weight in state["model"].values()} == {torch.float32}
    expected = tensors_of(LLAMA)[EMBEDDING].to(dtype).float()
    assert torch.equal(state["model"]["embedding.weight"][:ROWS], expected)


def in_shards(folder: Path) -> dict:
    """Cut the weights of a folder into two files; returns the index, which leaves one tensor of the second out."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= {name: file for name in part}
    del index[names[-1]]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_shards_are_read_by_what_they_hold(base):
    whole = read_base(str(base))["model"]
    in_shards(base)
    parts = read_base(str(base))["model"]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002.safetensors"):
        read_base(str(base))


def test_rotary_buffers_are_ignored(tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert said(make_base(tmp_path / "base", **buffer))[1] == []


def change(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def cut_short(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])


def spell_a_special_token(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    token = max(filter(str.isascii, spec["model"]["vocab"]), key=spec["model"]["vocab"].get)
    spec["added_tokens"].append(spec["added_tokens"][-1] | {"id": spec["model"]["vocab"][token], "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def write_index(folder: Path, weight_map) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def add_token(folder: Path, token) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": [*spec["added_tokens"], token]}))


def make_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


REFUSED = {
    "mistral": (lambda f: change(f, model_type="mistral"), "model_type mistral"),
    "no kind": (lambda f: change(f, model_type=None), "model_type None"),
    "quantised": (lambda f: change(f, quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "sliding window": (lambda f: change(f, sliding_window=1024), "sliding_window 1024"),
    "gelu": (lambda f: change(f, hidden_act="gelu"), "hidden_act gelu"),
    "yarn": (lambda f: change(f, rope_scaling={"type": "yarn", "factor": 4}), "rope scaling yarn"),
    "a missing key": (lambda f: change(f, hidden_size=None), "hidden_size"),
    "another width": (lambda f: change(f, hidden_size=96), "does not fit"),
    "another head size": (lambda f: change(f, head_dim=10), "does not fit"),
    "fewer heads": (lambda f: change(f, num_key_value_heads=1), "does not fit"),
    "more heads": (lambda f: change(f, num_key_value_heads=3), "does not fit"),
    "more rows": (lambda f: change(f, vocab_size=341), "does not fit"),
    "half of llama3": (lambda f: change(f, rope_scaling={"rope_type": "llama3", "factor": 8}), "low_freq_factor"),
    "a scaling that is spelled": (lambda f: change(f, rope_scaling="linear"), "rope scaling"),
    "an odd head size": (lambda f: change(f, head_dim=7), "head size"),
    "a run without a checkpoint": (lambda f: (f / "config.json").write_text('{"config": {}}'), "no ckpt.pt yet"),
    "a special token that text spells": (spell_a_special_token, "out of plain text"),
    "no config at all": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "no tokenizer at all": (lambda f: (f / "tokenizer.json").write_text("[]"), "no JSON object"),
    "an empty end": (lambda f: change(f, eos_token_id=[]), "eos_token_id"),
    "an end that is spelled": (lambda f: change(f, eos_token_id="</s>"), "eos_token_id"),
    "a negative end": (lambda f: change(f, eos_token_id=-1), "eos_token_id"),
    "an end beyond": (lambda f: change(f, eos_token_id=ROWS), f"names {ROWS} as eos_token_id"),
    "another depth": (lambda f: change(f, num_hidden_layers=3), "lacks model.layers.2"),
    "less depth": (lambda f: change(f, num_hidden_layers=1), "also has model.layers.1"),
    "fewer rows": (lambda f: change(f, vocab_size=300), "tokenizer.json has .* of the 300 rows"),
    "no end": (lambda f: change(f, eos_token_id=None), "eos_token_id"),
    "cut short": (cut_short, "no whole safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "no whole safetensors file"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), r"tokenizer.json.*\*\.model"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    "gguf": (lambda f: (f / "model.safetensors").rename(f / "model.gguf"), r"lacks model.safetensors.*\*\.gguf"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "model.bin"), r"lacks model.safetensors.*\*\.bin"),
    "a depth that is no whole number": (lambda f: change(f, num_hidden_layers=2.0), "num_hidden_layers"),
    "a kind in a list": (lambda f: change(f, model_type=["llama"]), "model_type"),
    "an end that is true": (lambda f: change(f, eos_token_id=True), "eos_token_id"),
    "a base of the rotation that is none": (lambda f: change(f, rope_theta=float("nan")), "rope_theta"),
    "a negative one": (lambda f: change(f, rope_theta=-1.0), "rope_theta"),
    "layers with windows": (lambda f: change(f, layer_types=["full_attention", "sliding_attention"]), "sliding_att"),
    "layers that are a number": (lambda f: change(f, layer_types=7), "not as transformers writes"),
    "a config that is too deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "no JSON object"),
    "an index of nothing": (lambda f: write_index(f, None), "not as transformers writes"),
    "an index that is a list": (lambda f: write_index(f, ["model.norm.weight"]), "not as transformers writes"),
    "an index of numbers": (lambda f: write_index(f, {"model.norm.weight": 1}), "not as transformers writes"),
    "an added token without content": (lambda f: add_token(f, {"id": 1}), "not as transformers writes"),
    "an added token that is a text": (lambda f: add_token(f, "</s>"), "not as transformers writes"),
    "weights that are a folder": (make_folder, "no whole safetensors file"),
    "a bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizers does not read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_folders_are_refused_by_name(name, base, capsys):
    """One line, before anything is made."""
    spoil, words = REFUSED[name]
    spoil(base)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        read_base(str(base))
    assert "\n" not in str(error.value) and str(base) in str(error.value)


@pytest.mark.parametrize("extra,words", [
    ({"model.layers.0.self_attn.o_proj.bias": torch.ones(48)}, "also has .*o_proj.bias"),
    ({"model.norm.weight": None}, "lacks model.norm.weight"),
    ({"model.norm.weight": torch.ones(48, dtype=torch.int8)}, "quantised"),
    ({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}, "quantised"),
    ({"model.norm.weight": torch.full((48,), float("nan"))}, "not finite")])
def test_other_tensors_are_refused_by_name(extra, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read_base(str(make_base(tmp_path / "base", **extra)))


def test_added_tokens_out_of_place_are_refused(base):
    """Those beyond the vocabulary, and markers that are not its last rows."""
    spec = json.loads((base / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][-1] | {"id": ROWS, "content": "<|late|>"})
    (base / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=f"has <.late.> as id {ROWS}"):
        read_base(str(base))


def test_a_marker_of_the_bases_own_is_refused(base):
    spec = json.loads((base / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][-1] | {"id": 320, "content": SOL})
    (base / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="markers of nanoBoLT as ids"):
        read_base(str(base))


def test_one_file_counts_before_an_old_index(base):
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1-of-9.safetensors"}}))
    assert read_base(str(base))["model_config"].layers == 2


def test_older_spellings_of_a_tokenizer_are_read():
    """Metaspace without a prepend_scheme; added tokens that strip white space do so no longer."""
    spec = json.loads(sentence_piece(False).to_str())
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    spec["added_tokens"].append(spec["added_tokens"][-1] | {
        "id": len(spec["model"]["vocab"]), "content": "<tool>", "special": False, "lstrip": True, "rstrip": True})
    ours = BaseTokenizer(json.dumps(lossless(spec)), ROWS)
    assert ours.decode(ours.encode("the  <tool>  cat")) == "the  <tool>  cat"


def test_missing_packages_and_hub_names_end_in_one_line(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors tokenizers"):
        read_base(str(base))
    with pytest.raises(FileNotFoundError, match="hf download hub-user/some-base --local-dir bases/some-base"):
        train.main(["--init_from", "hub-user/some-base", "--out", str(tmp_path / "run"), "--device", "cpu"])


# ---- the whole on a base ---------------------------------------------------------------------------------------

def document(i: int, latent: bool) -> dict:
    chunk = {"suffix": f" The dog's {i} bones were gone.", "latent": f" {i} bones, 12 mats" if latent else None}
    return {"text": f"The cat sat.{chunk['suffix']}", "chunks": [{"suffix": "The cat sat.", "given": True}, chunk]}


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, latent in (("gold", True), ("raw", False), ("held_out", True)):
        lines = (json.dumps(document(i, latent)) for i in range(12))
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def run_bolt(base, corpus, out, *more) -> Path:
    bolt.main(["--base", str(base), "--data", str(corpus), "--out", str(out), "--rounds", "2", "--warm_epochs", "1",
               "--train.epochs", "1", "--train.row_tokens", "128", "--train.batch_tokens", "256", "--device", "cpu",
               "--sample.num_latents", "2", "--sample.max_latent_tokens", "8", "--bound_draws", "4", "--arms",
               "em,raw_m_step,oracle", *more])
    return out


@pytest.mark.parametrize("restart", ["warm", "base", "previous"])
def test_bolt_runs_from_a_base(restart, base, corpus, tmp_path, monkeypatch, capsys):
    """To its report, with the settings that auto came to; M-steps start where --restart says; the last round's weights
    are left, and become a folder again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = []
    fit = bolt.fit
    monkeypatch.setattr(bolt, "fit", lambda lab, documents, config, folder, start, check=lambda model, state: None:
                        started.append(start) or fit(lab, documents, config, folder, start, check))
    out = run_bolt(base, corpus, tmp_path / "run", "--restart", restart)
    settings = json.loads((out / "config.json").read_text())["config"]["train"]
    assert settings["optimizer"] == "adamw" and settings["learning_rate"] == 1e-4
    assert settings["model"]["context"] == 256
    assert "| EM, K = 2, round 2 |" in (out / "report.md").read_text()
    assert sorted(str(path.parent.relative_to(out)) for path in out.glob("**/ckpt.pt")) == ["em/round_2", "warm"]
    _, first, second, *_ = started
    assert (first, second) == {"warm": ("warm", "warm"), "base": ("", ""), "previous": ("warm", "em/round_1")}[restart]
    saved = read_checkpoint(str(out / "em/round_2"))
    assert saved["optimizers"] == [] and saved["model_config"].qkv_bias is False
    export(str(out / "em/round_2"), str(tmp_path / "folder"))
    assert read_base(str(tmp_path / "folder"))["model_config"] == saved["model_config"]
    before = (out / "report.json").read_text()
    (base / "README.md").write_text("a note beside the base changes no run")
    run_bolt(base, corpus, tmp_path / "run", "--restart", restart)      # nothing is made again
    assert (out / "report.json").read_text() == before


def test_train_settles_what_a_base_wants(base, corpus, tmp_path):
    common = ["--data", str(corpus / "gold.jsonl"), "--row_tokens", "64", "--batch_tokens", "128", "--device", "cpu"]
    argv = [*common, "--init_from", str(base), "--out", str(tmp_path / "run"), "--epochs", "2"]
    with pytest.raises(ValueError, match="--model.context 512 exceeds that of the weights, 256"):
        train.main([*argv, "--model.context", "512"])
    with pytest.raises(ValueError, match="leave --model"):
        train.main([*argv, "--model.width", "32"])
    train.main([*argv, "--model.context", "100"])
    saved, settings = read_checkpoint(str(tmp_path / "run")), json.loads((tmp_path / "run/config.json").read_text())
    assert saved["model_config"].context == 100 and settings["config"]["optimizer"] == "adamw"
    assert saved["state"]["step"] == settings["config"]["steps"] > 1
    train.main([*common, "--init_from", str(tmp_path / "run"), "--out", str(tmp_path / "second"), "--steps", "1"])
    again = json.loads((tmp_path / "second/config.json").read_text())["config"]
    assert again["optimizer"] == "adamw" and again["learning_rate"] == 1e-4      # a base's child is one too


@pytest.mark.slow
def test_two_processes_draw_the_same_bytes_and_train_the_same_model(base, corpus, tmp_path):
    root = str(Path(__file__).resolve().parent.parent)

    def run(processes, command):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        subprocess.run([*torchrun, *command.split()], cwd=root, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for n in (1, 2):
        run(n, f"train.py --data {corpus}/gold.jsonl --init_from {base} --row_tokens 64 --batch_tokens 256 --steps 4 "
               f"--out {tmp_path}/run{n} --device cpu")
        run(n, f"sample_latents.py --checkpoint {tmp_path}/run1 --data {corpus}/raw.jsonl"
               f" --out {tmp_path}/latents{n}.jsonl --num_latents 2 --max_latent_tokens 8 --block_chunks 3"
               " --device cpu")
    assert (tmp_path / "latents1.jsonl").read_bytes() == (tmp_path / "latents2.jsonl").read_bytes()
    one, two = (read_checkpoint(str(tmp_path / f"run{n}"))["model"] for n in (1, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_from_a_base_ends_with_the_same_bytes(base, corpus, tmp_path):
    """bolt.py killed at several moments, then left to end."""
    root = str(Path(__file__).resolve().parent.parent)

    def start(out):
        code = ("import sys; sys.path.insert(0, 'tests'); from test_bases import run_bolt; "
                f"run_bolt({str(base)!r}, {str(corpus)!r}, {str(out)!r}, '--keep_models', 'last')")
        return subprocess.Popen([sys.executable, "-c", code], cwd=root,
                                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root})
    assert start(tmp_path / "whole").wait() == 0
    for part in ("warm/ckpt.pt", "em/round_1/latents.jsonl.run", "em/round_1/step_last.json", "em/round_2/ckpt.pt"):
        process = start(tmp_path / "killed")
        while process.poll() is None and not (tmp_path / "killed" / part).exists():
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    for name in ("em/round_1/latents.jsonl", "em/round_2/latents.jsonl", "em/round_2/ckpt.pt", "report.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
