"""The door to open weights: Hugging Face folders of the Llama and Qwen2 families, in and out.

    python train.py --init_from bases/SmolLM2-135M              in: config.json, model.safetensors, tokenizer.json
    python bolt.py --base bases/SmolLM2-135M --data FOLDER
    python -m data.bases runs/mine OUT                          out: a folder that transformers, vLLM and lm-eval load

Needs `pip install safetensors tokenizers`. What is taken, what is refused, what a folder of ours holds: data/bases.md.
"""
import argparse
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from data.tokens import BOS, EOL, EOS, MARKERS, PRIOR, SOL, Marked
from model import GPT, GPTConfig, read_checkpoint


def packages():
    """The optional packages of this door, (safetensors, tokenizers). Raises ValueError where one is missing."""
    try:
        import safetensors.torch
        import tokenizers
    except ImportError as error:
        raise ValueError(f"open bases need {error.name}: pip install safetensors tokenizers") from None
    return safetensors, tokenizers


def read_json(path: Path) -> dict:
    """Raises ValueError, FileNotFoundError."""
    if not path.is_file():
        others = ", ".join(sorted({f"*{other.suffix}" for other in path.parent.glob("*.*")})) or "nothing"
        raise FileNotFoundError(f"{path.parent} has no {path.name}, but {others}; nanoBoLT takes what transformers"
                                " saves: config.json, model.safetensors and tokenizer.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object; download it again")
    return content


# ---- configuration ---------------------------------------------------------------------------------------------

PLAIN = {"hidden_act": "silu", "quantization_config": None, "use_sliding_window": False, "partial_rotary_factor": 1,
         "rope_interleaved": False}         # what a GPT of ours does; no config may say otherwise
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def config_of(source: dict, path: Path) -> dict:
    """The fields of a GPTConfig that a config.json gives. Raises ValueError for what this GPT does not do."""
    def needed(name: str, part: dict = source):
        if part.get(name) is None:
            raise ValueError(f"{path} lacks {name}; is it the config.json of a model?")
        return part[name]
    kind, plain = source.get("model_type"), dict(PLAIN)
    if kind not in FAMILIES:
        raise ValueError(f"{path} is of model_type {kind}; nanoBoLT takes {' and '.join(FAMILIES)}")
    if kind == "llama":
        plain["sliding_window"] = None
    rope = (source.get("rope_scaling") or {}) | (source.get("rope_parameters") or {})
    for name, value in plain.items():
        if (source.get(name) or value) != value:
            raise ValueError(f"{path} has {name} {source[name]}; nanoBoLT takes folders without that")
    width, heads, head_dim = needed("hidden_size"), needed("num_attention_heads"), source.get("head_dim") or 0
    fields = {"context": needed("max_position_embeddings"), "layers": needed("num_hidden_layers"), "width": width,
              "heads": heads, "ffn": needed("intermediate_size"), "vocab_size": needed("vocab_size"),
              "kv_heads": source.get("num_key_value_heads") or heads,
              "head_dim": head_dim if head_dim != width / heads else 0, "norm_eps": source.get("rms_norm_eps") or 1e-6,
              "rope_base": float(rope.get("rope_theta") or source.get("rope_theta") or 10000.0),
              "qkv_bias": kind == "qwen2"}
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling == "llama3":
        names = {"rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor",
                 "rope_original": "original_max_position_embeddings"}
        fields |= {ours: needed(name, rope) for ours, name in names.items()}
    elif scaling != "default":
        raise ValueError(f"{path} has rope scaling {scaling}; nanoBoLT takes llama3's, or none")
    return fields


def ids_of_ends(tokenizer: "BaseTokenizer") -> dict:
    return {"bos_token_id": tokenizer.marker[BOS], "eos_token_id": tokenizer.marker[EOS],
            "pad_token_id": tokenizer.marker[EOS]}


def config_for(config: GPTConfig, tokenizer: "BaseTokenizer") -> dict:
    """The config.json of a model of ours: the inverse of `config_of`."""
    rope = {"rope_type": "llama3", "factor": config.rope_factor, "low_freq_factor": config.rope_low,
            "high_freq_factor": config.rope_high, "original_max_position_embeddings": config.rope_original}
    kind = "qwen2" if config.qkv_bias else "llama"
    return {"architectures": [FAMILIES[kind]], "model_type": kind, "hidden_act": "silu",
            "max_position_embeddings": config.context, "num_hidden_layers": config.layers, "hidden_size": config.width,
            "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_size,
            "intermediate_size": config.ffn, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_base,
            "rope_scaling": rope if config.rope_factor != 1 else None, "tie_word_embeddings": config.tied,
            "vocab_size": tokenizer.vocab_size} | ids_of_ends(tokenizer)


# ---- tokenizer -------------------------------------------------------------------------------------------------

def lossless(spec: dict) -> dict:
    """A tokenizer.json whose pieces can be encoded one by one: encode(a) + encode(b) decodes to a + b.

    Nothing is put before a text, nothing is stripped, cut or padded; what a text is split into stays as it is.
    """
    def walk(part):
        if isinstance(part, list):
            return [one for one in map(walk, part) if one is not None]
        if not isinstance(part, dict):
            return part
        if part.get("type") in ("Prepend", "Strip"):
            return None
        part = {name: walk(value) for name, value in part.items()}
        if part.get("type") == "Metaspace":
            part.pop("add_prefix_space", None)
            part["prepend_scheme"] = "never"
        elif "add_prefix_space" in part:
            part["add_prefix_space"] = False
        return part
    edges = {name: walk(spec.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")}
    added = [token | {"lstrip": False, "rstrip": False} for token in spec.get("added_tokens") or []]
    return spec | edges | {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}


@dataclass(frozen=True)
class BaseTokenizer(Marked):
    """The tokenizer of a base: its tokenizer.json, see `lossless`; the markers follow the rows of its vocabulary."""
    spec: str
    text_ids: int
    of_base = True

    def __reduce__(self):
        return BaseTokenizer, (self.spec, self.text_ids)       # to another process, without the library's object

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
        """Bytes of every text id; a token that spells a byte, as <0x0A>, is one."""
        is_byte_level, added = "ByteLevel" in str(self.library.decoder), self.library.get_added_tokens_decoder()

        def size(i: int) -> int:
            token = self.library.id_to_token(i) or ""
            if is_byte_level and i not in added:
                return len(token)               # a letter a byte
            return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
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


def open_tokenizer(folder: Path, rows: int) -> tuple[BaseTokenizer, bool]:
    """The tokenizer of a base of so many rows, and whether our markers are its last, as in a folder that we wrote.

    Raises ValueError where it has ids beyond the rows.
    """
    spec = lossless(read_json(folder / "tokenizer.json"))
    markers = [token["id"] for token in spec["added_tokens"] if token["content"] in MARKERS]
    ours = markers == list(range(rows - len(MARKERS), rows))
    if markers and not ours:
        raise ValueError(f"{folder}/tokenizer.json has markers of nanoBoLT as ids {markers}, not as the last of {rows} "
                         "rows; give a folder as data/bases.py writes it")
    if ours:
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in MARKERS]
    tokenizer = BaseTokenizer(json.dumps(spec, ensure_ascii=False), rows - len(MARKERS) * ours)
    packages()
    try:
        ids = tokenizer.library.get_vocab()
    except Exception as error:      # the library raises this and nothing narrower
        raise ValueError(f"tokenizers does not read {folder}/tokenizer.json: {str(error).splitlines()[0]}") from None
    ids |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    for token, i in ids.items():
        if i >= tokenizer.text_ids or tokenizer.library.token_to_id(token) != i:
            raise ValueError(f"{folder}/tokenizer.json has {token} as id {i}, which is none of the {rows} rows of its "
                             "config.json or comes after a gap; they are of different models")
    return tokenizer, ours


# ---- weights ---------------------------------------------------------------------------------------------------

OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INNER = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
         "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
         "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
         "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.out": "mlp.down_proj"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def their_name(ours: str) -> str:
    """blocks.3.attention.query.weight -> model.layers.3.self_attn.q_proj.weight"""
    module, kind = ours.rsplit(".", 1)
    if not module.startswith("blocks."):
        return f"{OUTER[module]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"model.layers.{layer}.{INNER[module]}.{kind}"


def files_of(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises FileNotFoundError."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.exists() and not files[0].exists():        # else it is an old one
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))] or files
    if missing := [file.name for file in files if not file.exists()]:
        others = ", ".join(sorted({f"*{other.suffix}" for other in folder.glob("*.*")} - {".json"}))
        raise FileNotFoundError(f"{folder} lacks {missing[0]}, and has {others}; download it whole, or save the model "
                                "with transformers: model.save_pretrained(FOLDER)")
    return files


class Weights:
    """The tensors of a folder by name, read one at a time, each file closed again, so that no memory stays mapped."""

    def __init__(self, folder: Path):
        self.place = {}         # name -> file and the name there
        for file in files_of(folder):
            with self.open(file) as opened:
                self.place |= {name: (file, name) for name in opened.keys() if not name.endswith("rotary_emb.inv_freq")}

    def open(self, file: Path):
        safetensors, _ = packages()
        try:
            return safetensors.safe_open(file, "pt")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}); download it again") from None

    def into(self, name: str, there: Tensor) -> None:
        """Copy a tensor to `there`, float32. Raises ValueError where it has another form."""
        file, there_name = self.place[name]
        with self.open(file) as opened:
            tensor = opened.get_tensor(there_name)
        if not tensor.is_floating_point() or tensor.shape != there.shape:
            raise ValueError(f"{file} has {name} as {tensor.dtype} {list(tensor.shape)}, which does not fit "
                             "its config.json; nanoBoLT takes no quantised weights")
        there.copy_(tensor)


def tie(weights: Weights, wanted: bool, say) -> bool:
    """Whether embedding and head are one: as config.json says, if the weights agree; one line where they do not."""
    if EMBEDDING not in weights.place and HEAD in weights.place and wanted:
        say(f"{HEAD} serves as the embedding too: config.json ties them, and there is no {EMBEDDING}")
        weights.place[EMBEDDING] = weights.place.pop(HEAD)
    elif wanted and weights.place.pop(HEAD, None):
        say(f"{HEAD} is left aside: config.json ties it to the embedding")
    elif not wanted and HEAD not in weights.place:
        say(f"the embedding serves as {HEAD} too: config.json does not tie them, but there is none")
        return True
    return wanted


def fill_markers(rows: Tensor, text_ids: int, begin: int, end: int) -> None:
    """Rows of fresh markers, in place: BOS starts as the base's first token of a text, EOS and EOL as its last, so that
    a thought is ended from the first step on; the others near the mean."""
    old, generator = rows[:text_ids], torch.Generator().manual_seed(0)
    near_mean = old.mean(dim=0) + 0.1 * old.std() * torch.randn(len(MARKERS), rows.shape[1], generator=generator)
    for number, marker in enumerate(MARKERS):
        like = {BOS: begin, EOS: end, EOL: end}.get(marker)
        rows[text_ids + number] = near_mean[number] if like is None else old[like]


def ends_of(source: dict, folder: Path, rows: int) -> tuple[int, int]:
    """The base's first and last token of a text. Raises ValueError where it names none that it has."""
    if source.get("eos_token_id") is None and (folder / "generation_config.json").exists():
        source = read_json(folder / "generation_config.json")
    begin, end = source.get("bos_token_id"), source.get("eos_token_id")
    end = next(iter(end), None) if isinstance(end, list) else end
    begin = end if begin is None else begin
    if not all(isinstance(i, int) and 0 <= i < rows for i in (begin, end)):
        raise ValueError(f"{folder}/config.json names {end} as eos_token_id and {begin} as bos_token_id, from whose "
                         f"rows EOL and BOS start; give ids below {rows}")
    return begin, end


def read_base(path: str, say=print) -> dict:
    """A Hugging Face folder as `read_checkpoint` gives a checkpoint: model_config, model (float32), tokenizer.

    Raises FileNotFoundError, ValueError for what is missing, not whole or not of the families that our GPT does.
    """
    folder = Path(path)
    source = read_json(folder / "config.json")
    fields = config_of(source, folder / "config.json")
    rows = fields["vocab_size"]
    tokenizer, has_markers = open_tokenizer(folder, rows)
    weights = Weights(folder)
    tied = tie(weights, bool(source.get("tie_word_embeddings")), say)
    fields |= {"vocab_size": tokenizer.vocab_size, "padding": -tokenizer.vocab_size % 64, "tied": tied}
    config = GPTConfig(**fields)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in GPT(config, seed=None).named_parameters()}
    theirs = {their_name(name): name for name in shapes}
    for what, names in (("lacks", theirs.keys() - weights.place), ("also has", weights.place.keys() - theirs)):
        if names:
            raise ValueError(f"{path} {what} {', '.join(sorted(names)[:3])} ({len(names)} in all); it is no plain "
                             f"{source['model_type']} model, or not whole")
    model = {}
    for name, ours in theirs.items():
        model[ours], of_vocabulary = torch.zeros(shapes[ours]), ours in ("embedding.weight", "head.weight")
        weights.into(name, model[ours][:rows] if of_vocabulary else model[ours])
        if of_vocabulary and not has_markers:
            fill_markers(model[ours], rows, *ends_of(source, folder, rows))
    if tied:
        model["head.weight"] = model["embedding.weight"]
    return {"model_config": config, "model": model, "tokenizer": tokenizer.state()}


# ---- out -------------------------------------------------------------------------------------------------------

CHAT = ("{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{SOL}{PRIOR}{{% endif %}}")       # a model that is asked thinks, then answers


def spec_for(tokenizer: BaseTokenizer) -> str:
    """A tokenizer.json that has the markers as special tokens, and reserved ones for rows that have none."""
    _, tokenizers = packages()
    library = tokenizers.Tokenizer.from_str(tokenizer.spec)
    reserved = [f"<|RESERVED_{i}|>" for i in range(tokenizer.text_ids) if library.id_to_token(i) is None]
    added = [tokenizers.AddedToken(name, special=True, normalized=False) for name in (*reserved, *MARKERS)]
    library.add_special_tokens(added)
    wanted = {name: int(name.strip("<|>").split("_")[1]) for name in reserved} | tokenizer.marker
    for name, i in wanted.items():
        if library.token_to_id(name) != i:
            raise ValueError(f"the vocabulary has a hole, so that a new token cannot have the id {i} of {name}")
    return library.to_str()


def export(checkpoint: str, out: str, dtype: str = "bfloat16") -> None:
    """Write a checkpoint that came from a base as a Hugging Face folder, whole or not at all.

    Raises ValueError where `out` is there already or the vocabulary is not a base's.
    """
    state, temporary = read_checkpoint(checkpoint), Path(f"{Path(out)}.{os.getpid()}.tmp")
    if os.path.exists(out):
        raise ValueError(f"{out} is there already; give another folder, or delete it")
    if "spec" not in state["tokenizer"]:
        raise ValueError(f"{checkpoint} has a vocabulary of nanoBoLT's own, unknown to transformers; give a run "
                         "that started from a base")
    (safetensors, _), tokenizer, config = packages(), BaseTokenizer(**state["tokenizer"]), state["model_config"]
    names = [name for name in state["model"] if not (config.tied and name == "head.weight")]
    rows = {"embedding.weight": tokenizer.vocab_size, "head.weight": tokenizer.vocab_size}
    tensors = {their_name(name): state["model"][name][:rows.get(name)].to(getattr(torch, dtype)).contiguous()
               for name in names}
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    files = {"config.json": config_for(config, tokenizer) | {"torch_dtype": dtype},
             "generation_config.json": ids_of_ends(tokenizer),
             "tokenizer_config.json": special | {
                 "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT,
                 "clean_up_tokenization_spaces": False, "model_max_length": config.context}}
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        (temporary / "tokenizer.json").write_text(spec_for(tokenizer), encoding="utf-8")
        safetensors.torch.save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder or checkpoint that came from a base")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"],
                        help="of the weights [bfloat16]")
    args = parser.parse_args(argv)
    export(args.checkpoint, args.out, args.dtype)
    print(f"{args.out}: {', '.join(sorted(os.listdir(args.out)))}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
