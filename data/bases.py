"""The door to open weights: Hugging Face folders of the Llama and Qwen2 families, in and out.

    python train.py --init_from bases/SmolLM2-135M              in: config.json, model.safetensors, tokenizer.json
    python bolt.py --base bases/SmolLM2-135M --data FOLDER
    python -m data.bases runs/mine OUT                          out: a folder that transformers, vLLM and lm-eval load

Needs `pip install safetensors tokenizers`. What is taken, what is refused, what a folder of ours holds: data/bases.md.
"""
import argparse
import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from data.run import OneLineParser, naming_the_file, one_line, read_json, script
from data.tokens import BOS, EOL, EOS, MARKERS, PRIOR, SOL, Marked, is_of_base
from model import GPT, GPTConfig, read_checkpoint


def packages():
    """The optional packages of this door, (safetensors, tokenizers). Raises ImportError where one is missing."""
    try:
        import safetensors.torch
        import tokenizers
    except ImportError as error:
        raise ImportError(f"open bases need {error.name}: pip install safetensors tokenizers") from None
    return safetensors, tokenizers


def refuse(what, *reasons: tuple) -> None:
    """Raises ValueError with the first of some (whether it holds, why) that holds."""
    for holds, why in reasons:
        if holds:
            raise ValueError(f"{what} {why}")


def kinds_in(folder: Path) -> str:
    return ", ".join(sorted({f"*{file.suffix}" for file in folder.glob("*.*")})) or "nothing"


def read_object(file: Path) -> dict:
    """What a JSON file of a folder says. Raises ValueError, FileNotFoundError."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}, but {kinds_in(file.parent)}; nanoBoLT takes what "
                                "transformers saves: config.json, model.safetensors and tokenizer.json")
    try:
        content = read_json(file)
    except ValueError:
        content = None
    refuse(file, (not isinstance(content, dict), "is no JSON object; download it again"))
    return content


# ---- configuration ---------------------------------------------------------------------------------------------

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
PLAIN = {"hidden_act": "silu", "quantization_config": None, "use_sliding_window": False, "sliding_window": None,
         "partial_rotary_factor": 1, "rope_interleaved": False}     # what our GPT does; no config may say otherwise
SHAPE = {"context": "max_position_embeddings", "layers": "num_hidden_layers", "width": "hidden_size",
         "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
         "ffn": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_base": "rope_theta"}     # our name and theirs
ROPE = {"rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor",
        "rope_original": "original_max_position_embeddings"}


def config_of(source: dict, path: Path) -> GPTConfig:
    """What a config.json says of a model. Raises ValueError for what this GPT does not do."""
    def fits(value, whole: bool) -> bool:
        return type(value) is int if whole else type(value) in (int, float) and 0 < value < math.inf
    kind, older, newer = (source.get(name) for name in ("model_type", "rope_scaling", "rope_parameters"))
    rope = older or newer or {}
    refuse(path,
           (older and newer and older != newer, "has rope_scaling and rope_parameters that differ; keep one of them"),
           (not isinstance(rope, dict), f"has rope scaling {rope}; nanoBoLT takes llama3's, or none"))
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    defaults = {"num_key_value_heads": source.get("num_attention_heads"), "head_dim": 0, "rms_norm_eps": 1e-6,
                "rope_theta": 10000}
    given = defaults | {name: value for name, value in (source | rope).items() if value or name not in defaults}
    names = SHAPE | {"vocab_size": "vocab_size"} | (ROPE if scaling == "llama3" else {})
    types = {field.name: field.type for field in fields(GPTConfig)}
    missing = [theirs for ours, theirs in names.items() if not fits(given.get(theirs), types[ours] is int)]
    layers = [layer for layer in source.get("layer_types") or [] if layer != "full_attention"]
    other = [f"{name} {given[name]}" for name, plain in PLAIN.items() if (given.get(name) or plain) != plain
             and (kind, name) != ("qwen2", "sliding_window")]       # of Qwen2, use_sliding_window says if it counts
    refuse(path,
           (kind is None and "config" in source, "is of a run of nanoBoLT that has no ckpt.pt yet; let it train first"),
           (kind not in [*FAMILIES], f"is of model_type {kind}; nanoBoLT takes {' and '.join(FAMILIES)}"),
           (other, f"has {', '.join(other)}; nanoBoLT takes folders without that"),
           (layers, f"has layers of {layers[:1]}; nanoBoLT takes full attention alone"),
           (missing, f"lacks a number that can be {', '.join(missing)}; is it the config.json of a model?"),
           (scaling not in ("default", "llama3"), f"has rope scaling {scaling}; nanoBoLT takes llama3's, or none"))
    values = {ours: given[theirs] for ours, theirs in names.items()}
    values |= {"rope_base": float(values["rope_base"]), "qkv_bias": kind == "qwen2",
               "head_dim": 0 if values["head_dim"] * values["heads"] == values["width"] else values["head_dim"]}
    try:
        return GPTConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_for(config: GPTConfig) -> dict:
    """The config.json of a model of ours: the inverse of `config_of`."""
    kind, values = "qwen2" if config.qkv_bias else "llama", asdict(config) | {"head_dim": config.head_size}
    rope = {"rope_type": "llama3"} | {theirs: values[ours] for ours, theirs in ROPE.items()}
    return {"architectures": [FAMILIES[kind]], "model_type": kind, "hidden_act": "silu",
            **{theirs: values[ours] for ours, theirs in SHAPE.items()},
            "rope_scaling": rope if config.rope_factor != 1 else None,
            "tie_word_embeddings": config.tied, "vocab_size": config.vocab_size}


# ---- tokenizer -------------------------------------------------------------------------------------------------

def lossless(spec: dict) -> dict:
    """A tokenizer.json whose pieces can be encoded one by one: encode(a) + encode(b) decodes to a + b.

    Nothing is put before a text, nothing is stripped, cut or padded; what a text is split into stays as it is.
    """
    def kept(part: dict) -> dict | None:        # a step of the tokenizer, whose own steps are done
        if part.get("type") in ("Prepend", "Strip"):
            return None
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        return {name: [one for one in value if one is not None] if isinstance(value, list) else value
                for name, value in part.items()}
    steps = json.dumps({name: spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")})
    added = [token | {"lstrip": False, "rstrip": False} for token in spec.get("added_tokens") or []]
    return spec | json.loads(steps, object_hook=kept) | {
        "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}


@dataclass(frozen=True)
class BaseTokenizer(Marked):
    """The tokenizer of a base: its tokenizer.json, see `lossless`; the markers follow the rows of its vocabulary."""
    spec: str
    text_ids: int

    def __reduce__(self):       # to another process, without the library's object, which it makes once
        return one_tokenizer, (self.spec, self.text_ids)

    @cached_property
    def library(self):
        _, tokenizers = packages()
        tokenizer = tokenizers.Tokenizer.from_str(self.spec)
        tokenizer.encode_special_tokens = True      # "<|im_end|>" in a text is text
        return tokenizer

    @cached_property
    def special(self) -> list[int]:
        """Ids of the base's own special tokens, and of rows without a token."""
        added = {i for i, token in self.library.get_added_tokens_decoder().items() if token.special}
        return [i for i in range(self.text_ids) if i in added or self.library.id_to_token(i) is None]

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of every text id."""
        is_byte_level, added = "ByteLevel" in str(self.library.decoder), self.library.get_added_tokens_decoder()

        def size(i: int) -> int:
            token = self.library.id_to_token(i) or ""
            if is_byte_level and i not in added:
                return len(token)               # a letter a byte
            return len(re.sub(r"^<0x[0-9A-F]{2}>\Z|▁", " ", token).encode())      # a spelled byte, and a space, is one
        return [size(i) for i in range(self.text_ids)]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, never a marker's or another special token's."""
        return self.library.encode(text, add_special_tokens=False).ids

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def decode(self, ids) -> str:
        """Text of ids; markers are spelled out."""
        return "".join(
            self.library.decode(list(part), skip_special_tokens=False) if is_text
            else "".join(MARKERS[i - self.text_ids] for i in part)
            for is_text, part in groupby(ids, lambda i: i < self.text_ids))

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"spec": self.spec, "text_ids": self.text_ids}


@cache
def one_tokenizer(spec: str, text_ids: int) -> BaseTokenizer:
    return BaseTokenizer(spec, text_ids)


def open_tokenizer(folder: Path, rows: int) -> BaseTokenizer:
    """The tokenizer of a base of so many rows. Raises ValueError where it has ids beyond the rows.

    In a folder that we wrote, our markers are the last of the rows.
    """
    file = folder / "tokenizer.json"
    spec = lossless(read_object(file))
    markers = [token["id"] for token in spec["added_tokens"] if token["content"] in MARKERS]
    refuse(file, (markers and markers != list(range(rows - len(MARKERS), rows)),
                  f"has markers of nanoBoLT as ids {markers}, not as the last of {rows} rows; give a folder as "
                  "data/bases.py writes it"))
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in MARKERS]
    tokenizer = BaseTokenizer(json.dumps(spec, ensure_ascii=False), rows - len(markers))
    packages()      # whose own error is another
    try:
        library = tokenizer.library
    except Exception as error:      # the library raises this and nothing narrower
        raise ValueError(f"tokenizers does not read {file}: {str(error).splitlines()[0]}") from None
    ids = library.get_vocab() | {token["content"]: token["id"] for token in spec["added_tokens"]}
    astray = [f"{token} as id {i}" for token, i in ids.items()
              if i >= tokenizer.text_ids or library.token_to_id(token) != i]
    spelled = [token for i in tokenizer.special if (token := library.id_to_token(i)) and i in tokenizer.encode(token)]
    refuse(file, (astray, f"has {', '.join(astray[:3])}, which is none of the {rows} rows of its config.json or comes "
                          "after a gap; they are of different models"),
           (spelled, f"makes {', '.join(spelled[:3])} out of plain text, and text must not end a document; nanoBoLT "
                     "takes tokenizers whose special tokens no text spells"))
    return tokenizer


# ---- weights ---------------------------------------------------------------------------------------------------

NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "blocks": "model.layers",
         "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attention": "self_attn",
         "query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj", "gate": "gate_proj", "up": "up_proj",
         "mlp.out": "mlp.down_proj"}        # our words and theirs
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OF_VOCABULARY = ("embedding.weight", "head.weight")     # ours whose rows are ids


def their_name(ours: str) -> str:
    """blocks.3.attention.query.weight -> model.layers.3.self_attn.q_proj.weight"""
    return re.sub(r"mlp\.out|\w+", lambda word: NAMES.get(word[0], word[0]), ours)


def places_of(folder: Path) -> dict[str, tuple[Path, str]]:
    """Where the tensors of a folder are: name -> file and the name there. Raises FileNotFoundError, ValueError."""
    (safetensors, _), files, places = packages(), [folder / "model.safetensors"], {}
    index = folder / "model.safetensors.index.json"
    if index.exists() and not files[0].exists():        # else it is an old one
        files = [folder / name for name in sorted(set(read_object(index).get("weight_map", {}).values()))] or files
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{folder} lacks {file.name}, and has {kinds_in(folder)}; download it whole, or "
                                    "save the model with transformers: model.save_pretrained(FOLDER)")
        try:
            with safetensors.safe_open(file, "pt") as opened:
                places |= {name: (file, name) for name in opened.keys() if not name.endswith("rotary_emb.inv_freq")}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}); download it again") from None
    return places


def tie(places: dict, wanted: bool, say) -> bool:
    """Whether embedding and head are one: as config.json says, if the weights agree; one line where they do not."""
    embedding, head = map(their_name, OF_VOCABULARY)
    if not wanted and head not in places:
        say(f"the embedding serves as {head} too: config.json does not tie them, but there is none")
    elif wanted and head in places:
        say(f"{head} is left aside: config.json ties it to the embedding" if embedding in places else
            f"{head} serves as the embedding too: config.json ties them, and there is no {embedding}")
        places.setdefault(embedding, places.pop(head))
    return wanted or head not in places


def read_into(there: Tensor, file: Path, name: str) -> None:
    """Copy a tensor of a file to `there`, float32. Raises ValueError where it has another form."""
    safetensors, _ = packages()
    with safetensors.safe_open(file, "pt") as opened:       # for each anew, so that no memory stays mapped
        tensor = opened.get_tensor(name)
    refuse(file, (tensor.dtype not in DTYPES or tensor.shape != there.shape,
                  f"has {name} as {tensor.dtype} {list(tensor.shape)}, which does not fit its config.json; nanoBoLT "
                  "takes no quantised weights"))
    is_finite = there.copy_(tensor).sum().isfinite()
    refuse(file, (not is_finite, f"has numbers in {name} that are not finite; download it again"))


def ends_of(source: dict, folder: Path, rows: int) -> dict[str, int]:
    """The row that a marker starts from: BOS the base's first token of a text, EOS and EOL its last, so that a thought
    is ended from the first step on. Raises ValueError where it names none that it has."""
    file = folder / "generation_config.json"
    if source.get("eos_token_id") is not None or not file.exists():
        file = folder / "config.json"
    begin, end = map(read_object(file).get, ("bos_token_id", "eos_token_id"))
    end = next(iter(end), None) if isinstance(end, list) else end       # Llama 3 has several
    begin = end if begin is None else begin
    refuse(file, (not all(type(i) is int and 0 <= i < rows for i in (begin, end)),
                  f"names {end} as eos_token_id and {begin} as bos_token_id, from whose rows EOL and BOS start; give "
                  f"ids below {rows}"))
    return {BOS: begin, EOS: end, EOL: end}


def fill_markers(weight: Tensor, rows: int, start: dict[str, int]) -> None:
    """Rows of fresh markers after the first `rows`, in place; those without a row to start from are near the mean."""
    old, generator = weight[:rows], torch.Generator().manual_seed(0)
    near_mean = old.mean(dim=0) + 0.1 * old.std() * torch.randn(len(MARKERS), old.shape[1], generator=generator)
    for new, marker, random in zip(weight[rows:], MARKERS, near_mean):
        new.copy_(old[start[marker]] if marker in start else random)


def read_folder(folder: Path, say) -> dict:
    """See `read_base`."""
    source = read_object(folder / "config.json")
    config = config_of(source, folder / "config.json")
    rows, tokenizer, places = config.vocab_size, open_tokenizer(folder, config.vocab_size), places_of(folder)
    config = replace(config, vocab_size=tokenizer.vocab_size, padding=-tokenizer.vocab_size % 64,
                     tied=tie(places, bool(source.get("tie_word_embeddings")), say))
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in GPT(config, seed=None).named_parameters()}
    theirs = {their_name(name) for name in shapes}
    for what, names in (("lacks", theirs - places.keys()), ("also has", places.keys() - theirs)):
        refuse(folder, (names, f"{what} {', '.join(sorted(names)[:3])} ({len(names)} in all); it is no plain "
                               f"{source['model_type']} model, or not whole"))
    fresh = tokenizer.text_ids == rows      # else the folder is one of ours, and has rows for the markers
    start, model = ends_of(source, folder, rows) if fresh else {}, {}
    for name, shape in shapes.items():
        model[name], of_vocabulary = torch.zeros(shape), name in OF_VOCABULARY
        read_into(model[name][:rows] if of_vocabulary else model[name], *places[their_name(name)])
        if of_vocabulary and fresh:
            fill_markers(model[name], rows, start)
    if config.tied:
        model["head.weight"] = model["embedding.weight"]
    return {"model_config": config, "model": model, "tokenizer": tokenizer.state()}


def read_base(path: str, say=print) -> dict:
    """A Hugging Face folder as `read_checkpoint` gives a checkpoint: model_config, model (float32), tokenizer.

    Raises FileNotFoundError, ValueError for what is missing, not whole, not of the families that our GPT does, or of
    another form than transformers gives it.
    """
    try:
        return read_folder(Path(path), say)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not as transformers writes a folder ({one_line(error)}); save the model with it "
                         "once more: model.save_pretrained(FOLDER)") from error


# ---- out -------------------------------------------------------------------------------------------------------

# how transformers splits text for any model_type qwen2, whatever its tokenizer.json says
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
               r"\s+(?!\S)|\s+")
ENDS = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
CHAT = ("{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{SOL}{PRIOR}{{% endif %}}")       # a model that is asked thinks, then answers


def spec_for(tokenizer: BaseTokenizer) -> str:
    """A tokenizer.json that has the markers as special tokens, and reserved ones for rows that have none."""
    _, tokenizers = packages()
    library = tokenizers.Tokenizer.from_str(tokenizer.spec)
    wanted = {f"<|RESERVED_{i}|>": i for i in range(tokenizer.text_ids) if library.id_to_token(i) is None}
    wanted |= tokenizer.marker
    library.add_special_tokens(list(wanted))
    for name, i in wanted.items():
        refuse("the vocabulary", (library.token_to_id(name) != i,
                                  f"has a hole, so that a new token cannot have the id {i} of {name}"))
    return library.to_str()


def export(checkpoint: str, out: str, dtype: str = "bfloat16") -> str:
    """Write a checkpoint that came from a base as a Hugging Face folder, whole or not at all; returns what one has to
    know of it, if anything.

    Raises ValueError where `out` is there already or the vocabulary is not a base's.
    """
    state, temporary = read_checkpoint(checkpoint), Path(f"{Path(out)}.{os.getpid()}.tmp")
    refuse(out, (os.path.exists(out), "is there already; give another folder, or delete it"))
    refuse(checkpoint, (not is_of_base(state["tokenizer"]), "has a vocabulary of nanoBoLT's own, unknown to "
                        "transformers; give a run that started from a base"))
    (safetensors, _), tokenizer, config = packages(), BaseTokenizer(**state["tokenizer"]), state["model_config"]
    if config.tied:
        del state["model"]["head.weight"]
    rows = dict.fromkeys(OF_VOCABULARY, config.vocab_size)      # without the padding
    tensors = {their_name(name): weight[:rows.get(name)].to(getattr(torch, dtype)).contiguous()
               for name, weight in state["model"].items()}
    ends = {f"{name}_id": tokenizer.marker[marker] for name, marker in ENDS.items()}
    files = {"config.json": config_for(config) | ends | {"torch_dtype": dtype}, "generation_config.json": ends,
             "tokenizer_config.json": ENDS | {
                 "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT,
                 "clean_up_tokenization_spaces": False, "model_max_length": config.context}}
    try:
        temporary.mkdir(parents=True)
        with naming_the_file(out):
            for name, content in files.items():
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
            (temporary / "tokenizer.json").write_text(spec_for(tokenizer), encoding="utf-8")
        safetensors.torch.save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        (temporary / "model.safetensors").chmod((temporary / "config.json").stat().st_mode)     # else the owner's alone
        temporary.rename(out)
    except safetensors.SafetensorError as error:
        raise OSError(f"could not write {out} ({error}); make room") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    own = json.dumps(QWEN2_SPLIT, ensure_ascii=False) in tokenizer.spec
    return "" if own or not config.qkv_bias else (
        "\ntransformers reads a Qwen2 model with Qwen2's own splitting of text, which is not this tokenizer's; for its "
        f"ids take PreTrainedTokenizerFast(tokenizer_file='{out}/tokenizer.json')")


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder or checkpoint that came from a base")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"],
                        help="of the weights [bfloat16]")
    args = parser.parse_args(argv)
    note = export(args.checkpoint, args.out, args.dtype)
    print(f"{args.out}: {', '.join(sorted(os.listdir(args.out)))}{note}")


if __name__ == "__main__":
    script(main)
