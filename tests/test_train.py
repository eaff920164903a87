"""Laws of train.py: the loss is summed and divided once, resuming is bit-identical, two processes do what one does."""
import collections
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train as train_module
from data.corpus import encode_document
from data.layout import LATENT, TEXT
from data.loader import Position, Recipe, epoch_rows, training_batches
from data.run import Ranks
from data.tokens import Tokenizer
from model import GPTConfig, Shape, read_checkpoint, restore, save_checkpoint
from tests.conftest import RECORDS, full_disk, random_model, tokenizer_for
from train import (Forward, Muon, TrainConfig, TrainState, backward, main, make_optimizers, nearest_orthogonal,
                   new_model, schedule, settled, train, validate, validation_config, warmup_steps, with_steps)

SMALL = settled(TrainConfig(steps=12, batch_tokens=64, row_tokens=16, checkpoint_every=5,
                            model=Shape(context=32, width=16, ffn=24, heads=2, kv_heads=2)), None)
ALONE = Ranks(0, 1, torch.device("cpu"))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def plain(model):
    """The model as training calls it: eager, in float32, in one process."""
    return Forward(model, "float32", False, ALONE)


@pytest.fixture
def batch(documents, layout, alone):
    """Ragged: four rows with different numbers of targets."""
    batch = next(training_batches(documents, layout, Recipe(96, 24), Position(), alone))
    assert len({int((row >= 0).sum()) for row in batch.mine.targets}) > 1
    return batch


def gradients(model):
    return [weight.grad.clone() for weight in model.parameters()]


def test_the_gradient_is_that_of_the_mean_over_all_targets(batch, alone, layout):
    """One mean over the targets of the batch, however it is cut into micro-batches: 1 x 4 == 2 x 2 == 4 x 1."""
    model = random_model(layout.tokenizer.vocab_size)
    log_p = model(batch.mine.ids, batch.mine.targets, batch.mine.document)
    (-log_p.sum() / batch.num_targets).backward()
    expected = gradients(model)
    for rows in (0, 1, 2, 3):
        model.zero_grad()
        sums = backward(plain(model), batch, rows, alone)
        assert sums[2].item() == pytest.approx(-log_p.sum().item(), rel=1e-5)
        for ours, theirs in zip(gradients(model), expected):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_ranks_with_unequal_counts_average_to_the_same_gradient(batch, documents, layout):
    """The mean over ranks, which is what DDP takes, of each rank's gradient is that of one process; also where a rank
    has no row."""
    model = random_model(layout.tokenizer.vocab_size)
    backward(plain(model), batch, 0, ALONE)
    expected = gradients(model)
    for world in (2, 3, 5):
        parts = []
        for rank in range(world):
            model.zero_grad()
            ranks = Ranks(rank, world, torch.device("cpu"))
            mine = next(training_batches(documents, layout, Recipe(96, 24), Position(), ranks))
            backward(plain(model), mine, 0, ranks)
            parts.append(gradients(model))
        for whole, *each in zip(expected, *parts):
            torch.testing.assert_close(sum(each) / world, whole, atol=1e-6, rtol=1e-4)


def test_the_schedules_as_a_table():
    """Warm-up over 2 of 20 steps; wsd falls to zero over the last 10, cosine from the warm-up on, constant never."""
    table = {"wsd": [0.5, 1, 1, 1, 1, 0.9, 0.5, 0.1], "cosine": [0.5, 1, 0.99, 0.62, 0.54, 0.46, 0.16, 0.01],
             "constant": [0.5] + [1] * 7}
    for name, shares in table.items():
        config = replace(SMALL, steps=20, warmup=0.1, decay=0.5, schedule=name)
        assert [round(schedule(step, config, 2), 2) for step in (0, 1, 2, 9, 10, 11, 15, 19)] == shares, name
        assert warmup_steps(config) == 2


def test_newton_schulz_brings_singular_values_near_one():
    for shape in ((2, 16, 16), (3, 8, 20), (1, 20, 8)):
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(nearest_orthogonal(drawn))
        assert values.min() > 0.3 and values.max() < 1.3


def test_muon_takes_the_steps_of_torch():
    """Stacked in float32, ours moves as torch.optim.Muon does in bfloat16, up to bfloat16's precision."""
    start = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one, two = Muon([ours], lr=0.02, weight_decay=0.1), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for step in range(5):
        gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(step + 1))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        two.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.05 * moved


@pytest.mark.parametrize("epochs", [0.4, 1.0])
def test_epochs_are_as_many_steps_as_read_the_documents_so_often(epochs, layout, documents, alone):
    """The last step of a pass is the first after which every row of it has been read."""
    many = [replace(document, index=i) for i, document in enumerate(documents * 15)]
    config = with_steps(replace(SMALL, epochs=epochs), many, layout)
    batches = training_batches(many, layout, config, Position(), alone)
    ends = [next(batches).position for _ in range(config.steps + 1)]
    rows = sum(1 for _ in epoch_rows(many, layout, config))
    assert (config.steps - 1) * config.rows < epochs * rows <= config.steps * config.rows
    assert ends[-2].epoch <= ends[-1].epoch == math.floor(epochs) and with_steps(SMALL, many, layout) == SMALL


def test_auto_is_settled_by_where_the_weights_come_from(tokenizer):
    """Muon for fresh weights, AdamW with small steps for those of a base; what is given stays."""
    fresh, base = replace(SMALL, optimizer="auto", learning_rate="auto", model=Shape(context=0)), {
        "model_config": GPTConfig(context=32), "tokenizer": {"spec": "{}", "text_ids": 5}}
    assert (settled(fresh, None).optimizer, settled(fresh, None).learning_rate) == ("muon", 3e-3)
    assert settled(settled(fresh, None), None) == settled(fresh, None)
    assert (settled(fresh, base).optimizer, settled(fresh, base).learning_rate) == ("adamw", 1e-4)
    given = replace(fresh, optimizer="muon", learning_rate=0.1)
    assert settled(given, base) == replace(given, model=Shape(context=32))


def test_every_weight_has_one_optimizer(layout):
    model = random_model(layout.tokenizer.vocab_size)
    for name, count in (("adamw", 1), ("muon", 2)):
        optimizers = make_optimizers(model, replace(SMALL, optimizer=name, learning_rate=1e-3), torch.device("cpu"))
        held = [id(w) for o in optimizers for group in o.param_groups for w in group["params"]]
        assert len(optimizers) == count and sorted(held) == sorted(map(id, model.parameters()))


def test_blocks_computed_again_give_the_same_gradient(layout, documents, alone):
    model = random_model(layout.tokenizer.vocab_size)
    batch = next(training_batches(documents, layout, SMALL, Position(), alone))
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        backward(model, batch, 0, alone)
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.equal(*gradients)


def fresh(tokenizer, config=SMALL):
    return new_model(config, None, tokenizer)


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_training_overfits_a_few_documents(tokenizer, layout, documents, alone, tmp_path):
    config = replace(SMALL, steps=150, learning_rate=1e-2)
    model = fresh(tokenizer)
    train(model, tokenizer, documents, config, str(tmp_path), alone)
    assert validate(plain(model), tokenizer, documents[2:3], config, alone)["nll_text"] < 1.0
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 150 and last["loss"] < 1.0


def test_compiling_follows_a_rule_on_size(tokenizer, monkeypatch):
    """Where a run is long enough to make up for it, and a compiler is there."""
    model, long = fresh(tokenizer), replace(SMALL, steps=10 ** 10)
    assert not train_module.chosen(SMALL, model, ALONE)["compile"]
    assert train_module.chosen(replace(SMALL, compile="on"), model, ALONE)["compile"]
    assert not train_module.chosen(replace(long, compile="off"), model, ALONE)["compile"]
    monkeypatch.setattr(train_module.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert train_module.chosen(long, model, ALONE)["compile"]
    monkeypatch.setattr(train_module.shutil, "which", lambda name: None)
    assert not train_module.chosen(long, model, ALONE)["compile"]


def test_a_run_goes_on_as_it_began(tokenizer, documents, alone, tmp_path, monkeypatch):
    """In its dtype, whatever the machine that continues it would choose, and with its warm-up where it grows."""
    config = replace(SMALL, schedule="constant", warmup=0.5)
    monkeypatch.setattr(train_module, "choose_dtype", lambda *arguments: "bfloat16")
    train(fresh(tokenizer), tokenizer, documents, config, str(tmp_path), alone)
    monkeypatch.setattr(train_module, "choose_dtype", lambda *arguments: "float32")
    state = train(fresh(tokenizer), tokenizer, documents, replace(config, steps=20), str(tmp_path), alone)
    assert (state.step, state.dtype, state.compile, state.warmup) == (20, "bfloat16", False, 6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_run_learns_what_an_eager_one_does(tokenizer, documents, alone, tmp_path, dtype):
    """The same steps to within floating point, validation included, and again the same bits."""
    found = {}
    for name, compile in (("eager", "off"), ("compiled", "on"), ("again", "on")):
        (tmp_path / name).mkdir()
        model, config = fresh(tokenizer), replace(SMALL, dtype=dtype, compile=compile)
        train(model, tokenizer, documents, config, str(tmp_path / name), alone)
        found[name] = weights(model)
    assert torch.equal(found["compiled"], found["again"])
    tolerance = 1e-4 if dtype == "float32" else 0.05
    assert (found["compiled"] - found["eager"]).norm() < tolerance * found["eager"].norm()


def test_a_killed_run_continues_to_the_same_weights(tokenizer, documents, alone, tmp_path, monkeypatch):
    """Stopped between checkpoints, at one, or while one is written: bit for bit the uninterrupted weights and
    optimizer."""
    whole = fresh(tokenizer)
    (tmp_path / "whole").mkdir()
    train(whole, tokenizer, documents, SMALL, str(tmp_path / "whole"), alone)
    train_step = train_module.train_step
    for stop in (3, 5, 7, 11):
        folder = tmp_path / f"stop{stop}"
        folder.mkdir()

        steps_taken = itertools.count()

        def failing(*arguments):
            if next(steps_taken) == stop:
                raise KeyboardInterrupt
            return train_step(*arguments)
        monkeypatch.setattr(train_module, "train_step", failing)
        with pytest.raises(KeyboardInterrupt):
            train(fresh(tokenizer), tokenizer, documents, SMALL, str(folder), alone)
        monkeypatch.setattr(train_module, "train_step", train_step)
        model = fresh(tokenizer)
        state = train(model, tokenizer, documents, SMALL, str(folder), alone)
        assert torch.equal(weights(model), weights(whole)) and state.step == 12
        steps = [row["step"] for row in rows_of(folder)]
        assert steps == sorted(set(steps)) and [row["seconds"] for row in rows_of(folder)] == sorted(
            row["seconds"] for row in rows_of(folder))
        for file in ("ckpt.pt", "stable.pt"):       # the latter with the optimizers
            assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    saved, again = (read_checkpoint(str(tmp_path / name / "ckpt.pt")) for name in ("whole", "stop7"))
    assert saved["state"] == again["state"]
    for a, b in zip(saved["optimizers"], again["optimizers"]):
        for one, two in zip(a["state"].values(), b["state"].values()):
            assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])) for name in one)


def test_a_finished_run_is_not_trained_again(tokenizer, documents, alone, tmp_path):
    train(fresh(tokenizer), tokenizer, documents, SMALL, str(tmp_path), alone)
    model = fresh(tokenizer)
    state = train(model, tokenizer, documents, SMALL, str(tmp_path), alone)
    assert state.step == 12 and not torch.equal(weights(model), weights(fresh(tokenizer)))


def test_a_checkpoint_of_another_model_is_refused(tokenizer, documents, alone, tmp_path):
    train(fresh(tokenizer), tokenizer, documents, SMALL, str(tmp_path), alone)
    other = replace(SMALL, model=replace(SMALL.model, ffn=32))
    with pytest.raises(ValueError, match="another model_config.*--out"):
        train(fresh(tokenizer, other), tokenizer, documents, other, str(tmp_path), alone)


def test_a_checkpoint_of_another_vocabulary_is_refused(tokenizer, documents, alone, tmp_path):
    train(fresh(tokenizer), tokenizer, documents, SMALL, str(tmp_path), alone)
    other = replace(tokenizer, tokens=(b"z", *tokenizer.tokens[1:]))
    with pytest.raises(ValueError, match="another tokenizer.*--out"):
        train(fresh(other), other, documents, SMALL, str(tmp_path), alone)


def test_half_a_checkpoint_is_refused(tokenizer, documents, alone, tmp_path):
    train(fresh(tokenizer), tokenizer, documents, SMALL, str(tmp_path), alone)
    path = tmp_path / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="ckpt.pt.*not a whole checkpoint"):
        train(fresh(tokenizer), tokenizer, documents, SMALL, str(tmp_path), alone)


def test_a_loss_that_is_no_number_stops_the_run(tokenizer, documents, alone, tmp_path, monkeypatch):
    """The steps are named, and the checkpoint before them stays."""
    train_step = train_module.train_step

    steps_taken = itertools.count()

    def spoilt(model, *rest):
        if next(steps_taken) == 6:
            with torch.no_grad():
                model.norm.weight.fill_(float("inf"))
        return train_step(model, *rest)
    monkeypatch.setattr(train_module, "train_step", spoilt)
    model = fresh(tokenizer)
    with pytest.raises(ValueError, match="not a number in steps 7 to 10; .*lower --learning_rate"):
        train(model, tokenizer, documents, SMALL, str(tmp_path), alone)
    saved = read_checkpoint(str(tmp_path / "ckpt.pt"))
    assert saved["state"]["step"] == 6 and weights(restore(saved)).isfinite().all()


def test_validation_gives_nats_by_kind_and_bits_per_byte(tokenizer, layout, documents, alone):
    """Against the log-probabilities of each document alone."""
    model = random_model(tokenizer.vocab_size)
    record = validate(plain(model), tokenizer, documents, replace(SMALL, layout="prior"), alone, batch_rows=2)
    nll, count, text_bytes = collections.Counter(), collections.Counter(), 0
    for document in documents:
        sequence = layout.document(document, [True] * len(document.chunks))
        ids = torch.tensor([sequence.ids])
        log_probs = model(ids[:, :-1], ids[:, 1:])[0].tolist()
        for log_p, target, kind in zip(log_probs, sequence.ids[1:], sequence.kinds[1:]):
            nll[kind] -= log_p
            count[kind] += 1
            text_bytes += len(tokenizer.tokens[target]) if kind == TEXT else 0
    for name, kind in (("latent", LATENT), ("text", TEXT)):
        assert record[f"nll_{name}"] == pytest.approx(nll[kind] / count[kind], rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(nll[TEXT] / text_bytes / math.log(2), rel=1e-5)


def test_the_first_loss_is_that_of_a_guess(tokenizer, documents, alone, tmp_path):
    """ln(vocabulary), since the head starts at zero."""
    records, config = [], replace(SMALL, steps=1)
    train(fresh(tokenizer), tokenizer, documents, config, str(tmp_path), alone, at_record=records.append)
    assert records[0]["loss"] == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-5)


def test_training_on_drawn_latents_uses_exactly_the_sampled_ids(layout, alone):
    """Ids that no text would be encoded to reach the batch as they are."""
    tokenizer = layout.tokenizer
    ids = [*tokenizer.encode(" a"), *tokenizer.encode("b")]
    chunk = {"suffix": "a", "latent": tokenizer.decode(ids), "latent_ids": ids}
    document = encode_document(0, {"text": "a", "chunks": [chunk]}, tokenizer)
    batch = next(training_batches([document], layout, Recipe(16, 16, layout="prior"), Position(), alone))
    assert batch.mine.targets[0][batch.mine.kinds[0] == LATENT].tolist() == ids and batch.num_latent == 2


def test_the_raw_layout_is_a_plain_language_model(tokenizer, layout, documents, alone):
    """Its nats are -log p of the text given BOS and what came before, thoughts or not."""
    model = random_model(tokenizer.vocab_size)
    ids = torch.tensor([[layout.bos, *documents[1].chunks[0].suffix, *documents[1].chunks[1].suffix]])
    expected = -model(ids[:, :-1], ids[:, 1:]).mean().item()
    record = validate(plain(model), tokenizer, documents[1:2], replace(SMALL, layout="raw"), alone)
    assert record["nll_text"] == pytest.approx(expected, rel=1e-5) and "nll_latent" not in record


def test_latent_only_needs_latents(tokenizer, documents, alone, tmp_path):
    """A corpus without any is refused, not searched for ever; held-out documents without any give nothing."""
    config = replace(SMALL, layout="latent_only")
    with pytest.raises(ValueError, match="--layout latent_only"):
        train(fresh(tokenizer), tokenizer, documents[2:3], config, str(tmp_path), alone)
    assert validate(plain(fresh(tokenizer)), tokenizer, documents[2:3], config, alone) == {}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def flags(corpus, out, *more):
    return ["--data", str(corpus), "--held_out", str(corpus), "--out", str(out), "--steps", "6", "--batch_tokens", "64",
            "--row_tokens", "16", "--model.width", "16", "--model.ffn", "24", "--device", "cpu", *more]


def test_main_trains_and_says_where_the_checkpoint_is(corpus, tmp_path, capsys):
    main(flags(corpus, tmp_path / "run"))
    said = capsys.readouterr().out
    assert f"{tmp_path}/run/ckpt.pt: 6 steps, " in said and "in float32" in said
    assert "step 6/6  loss" in said and "held-out:  text" in said
    train_rows, held_out = ([row for row in rows_of(tmp_path / "run") if row["kind"] == kind]
                            for kind in ("train", "held-out"))
    where = {"kind", "step", "tokens", "seconds"}
    assert {*where, "loss", "nll_latent", "nll_text", "tokens_per_second", "waiting"} <= set(train_rows[0])
    assert set(held_out[-1]) == {*where, "nll_text", "nll_latent", "bits_per_byte"}
    assert train_rows[-1]["tokens"] == held_out[-1]["tokens"] > train_rows[0]["tokens"] > 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["steps"] == 6


@pytest.mark.parametrize("more, named", [
    (["--row_tokens", "999"], "--row_tokens 999"), (["--batch_tokens", "8"], "--batch_tokens 8"),
    (["--steps", "0"], "--steps: 0"), (["--batch_tokens", "50"], "multiple"), (["--device", "gpu"], "--device gpu"),
    (["--encoding", "gtp2"], "--encoding gtp2"), (["--model.heads", "0"], "heads"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--raw_mix", "2"], "--raw_mix: 2")])
def test_bad_settings_end_before_work_is_spent(corpus, tmp_path, more, named):
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        main(flags(corpus, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_training_on_drawn_latents_starts_from_the_checkpoint_that_drew_them(corpus, tmp_path):
    """Its vocabulary comes along, so the ids mean what they meant; a fresh vocabulary is refused."""
    tokenizer = tokenizer_for([" 0 a b c d e", "a", "b", " z"], "words")
    model = random_model(tokenizer.vocab_size, context=256)
    save_checkpoint(str(tmp_path / "old.pt"), model, tokenizer=tokenizer.state())
    chunk = {"suffix": "a b", "latent": " z", "latent_ids": tokenizer.encode(" z")}
    (tmp_path / "drawn.jsonl").write_text(json.dumps({"text": "a b", "chunks": [chunk]}) + "\n")
    argv = ["--data", str(tmp_path / "drawn.jsonl"), *flags(corpus, tmp_path / "run")[2:]]
    with pytest.raises(ValueError, match="--init_from"):
        main(argv)
    with pytest.raises(ValueError, match="leave --model"):
        main([*argv, "--init_from", str(tmp_path / "old.pt")])
    argv = [word for word in argv if word not in ("--model.width", "--model.ffn", "16", "24")]
    argv = argv[:argv.index("--row_tokens")] + argv[argv.index("--row_tokens") + 1:] + ["--row_tokens", "16"]
    with pytest.raises(ValueError, match="leave --encoding out"):
        main([*argv, "--init_from", str(tmp_path / "old.pt"), "--encoding", "gpt2"])
    main([*argv, "--init_from", str(tmp_path / "old.pt")])
    assert Tokenizer(**read_checkpoint(str(tmp_path / "run" / "ckpt.pt"))["tokenizer"]) == tokenizer


def test_a_run_does_not_go_on_with_other_data(corpus, tmp_path):
    main(flags(corpus, tmp_path / "run"))
    corpus.write_text(corpus.read_text() + json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(ValueError, match="other settings .data_sha256"):
        main(flags(corpus, tmp_path / "run"))


def test_held_out_text_stands_as_the_training_taught_it(documents, layout, alone):
    """After SOL EOL where the corpus has thoughts and the layout trains that form, else bare."""
    bare = [replace(document, chunks=[replace(chunk, latent=None) for chunk in document.chunks])
            for document in documents]
    for part, name, plain_as in ((documents, "joint", "no_thought"), (documents, "posterior", "no_thought"),
                                 (documents, "prior", "plain"), (documents, "raw", "plain"), (bare, "joint", "plain")):
        config, state = replace(SMALL, layout=name), TrainState()
        for batch in itertools.islice(training_batches(part, layout, config, Position(), alone), 3):
            state.count(batch)
        assert validation_config(config, state) == replace(SMALL, layout=name, plain_as=plain_as)


def test_a_held_out_corpus_beside_the_data_is_found(corpus, tmp_path, capsys):
    argv = flags(corpus, tmp_path / "run")
    argv = argv[:2] + argv[4:]
    main(argv)
    assert "held-out" not in capsys.readouterr().out
    corpus.with_name("held_out.jsonl").write_text(json.dumps({"text": "b d"}) + "\n")
    main([*argv[:2], "--out", str(tmp_path / "again"), *argv[4:]])
    assert "held-out:  text" in capsys.readouterr().out


def test_the_same_run_gives_the_same_bytes(corpus, tmp_path):
    """Checkpoints hold no time, path or device; and each is the checkpoint of its run only."""
    for name in ("one", "two"):
        main(flags(corpus, tmp_path / name))
    for file in ("ckpt.pt", "stable.pt"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("schedule_name, goes_on", [("wsd", True), ("constant", True), ("cosine", False)])
def test_more_steps_go_on_as_if_they_had_been_asked_for(schedule_name, goes_on, corpus, tmp_path):
    """From the state before the learning rate fell, with the warm-up that it began with; cosine falls at once."""
    more = ["--schedule", schedule_name, "--log_every", "1", "--warmup", "0.5", "--learning_rate", "1e-2"]
    main(flags(corpus, tmp_path / "run", *more))
    longer = [*flags(corpus, tmp_path / "run", *more), "--steps", "10"]
    if not goes_on:
        with pytest.raises(ValueError, match="is of --steps 6, from which.*--out for 10"):
            main(longer)
        return main(flags(corpus, tmp_path / "run", *more))         # what was refused changed nothing
    main(longer)
    at_once = [*flags(corpus, tmp_path / "at_once", *more), "--steps", "10", "--warmup", "0.3"]
    main(at_once)
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == (tmp_path / "at_once" / "ckpt.pt").read_bytes()
    assert [(row["step"], row["kind"]) for row in rows_of(tmp_path / "run")][-1] == (10, "held-out")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["steps"] == 10
    main(longer)        # a finished one stays as it is
    with pytest.raises(ValueError, match="steps 10 -> 6"):
        main(flags(corpus, tmp_path / "run", *more))


def test_the_weights_that_are_best_on_held_out_text_are_kept(corpus, tmp_path):
    main([*flags(corpus, tmp_path / "run", "--keep", "best", "--checkpoint_every", "1"), "--learning_rate", "1",
          "--muon_learning_rate", "1", "--schedule", "constant", "--steps", "5"])
    held_out = {row["step"]: row["nll_text"] for row in rows_of(tmp_path / "run") if row["kind"] == "held-out"}
    best = read_checkpoint(str(tmp_path / "run" / "best.pt"))
    assert best["state"]["step"] == min(held_out, key=held_out.get) < 5
    assert not (tmp_path / "run" / "stable.pt").exists()


def test_a_run_on_thoughts_alone_goes_on(corpus, tmp_path):
    """Held-out rows then have no text."""
    more = ["--layout", "latent_only", "--keep", "both"]
    main(flags(corpus, tmp_path / "run", *more))
    main([*flags(corpus, tmp_path / "run", *more), "--steps", "8"])
    held_out = [row for row in rows_of(tmp_path / "run") if row["kind"] == "held-out"]
    assert held_out[-1]["step"] == 8 and all("nll_text" not in row for row in held_out)


def test_a_full_disk_keeps_the_last_checkpoint(corpus, tmp_path):
    """One line that names the file; the same command ends as if nothing had been."""
    main(flags(corpus, tmp_path / "whole", "--checkpoint_every", "2"))
    size = (tmp_path / "whole" / "ckpt.pt").stat().st_size
    with full_disk(size // 2), pytest.raises(OSError, match="could not write .*ckpt.pt"):
        main(flags(corpus, tmp_path / "run", "--checkpoint_every", "2"))
    main([*flags(corpus, tmp_path / "run", "--checkpoint_every", "2")])
    assert (tmp_path / "whole" / "ckpt.pt").read_bytes() == (tmp_path / "run" / "ckpt.pt").read_bytes()
    assert not list((tmp_path / "run").glob("*.tmp"))


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]


@pytest.mark.slow
def test_two_processes_do_what_one_does(corpus, tmp_path):
    """torchrun over two gloo processes: the same weights up to float error, the same counts."""
    root = Path(train_module.__file__).parent
    for name, launcher in (("one", ["-m", "train"]), ("two", TORCHRUN)):
        subprocess.run([sys.executable, *launcher, *flags(corpus, tmp_path / name)], cwd=root, check=True)
    one, two = (read_checkpoint(str(tmp_path / name / "ckpt.pt")) for name in ("one", "two"))
    assert one["state"] == two["state"]
    torch.testing.assert_close(weights(restore(one)), weights(restore(two)), atol=1e-4, rtol=1e-3)


def wait_until_free(folder, seconds=10):
    """Until no process has a run folder."""
    end = time.time() + seconds
    with open(folder / ".lock") as lock:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.time() < end, f"{folder} is held"
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["train.py"], TORCHRUN])
def test_kill_minus_9_and_again_gives_the_same_weights(corpus, tmp_path, launcher):
    """Processes killed in the middle, then the same command: the same bits of weights, with one process and with two,
    which torchrun has in sessions of their own and leaves alive."""
    root = Path(train_module.__file__).parent
    long = ["--steps", "100", "--checkpoint_every", "10"]
    subprocess.run([sys.executable, *launcher, *flags(corpus, tmp_path / "whole", *long)], cwd=root, check=True)
    command = [sys.executable, *launcher, *flags(corpus, tmp_path / "killed", *long)]
    process = subprocess.Popen(command, cwd=root, start_new_session=True)
    while not (tmp_path / "killed" / "ckpt.pt").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_free(tmp_path / "killed")
    assert read_checkpoint(str(tmp_path / "killed" / "ckpt.pt"))["state"]["step"] < 100
    subprocess.run(command, cwd=root, check=True)
    one, two = (restore(read_checkpoint(str(tmp_path / name / "ckpt.pt"))) for name in ("whole", "killed"))
    assert torch.equal(weights(one), weights(two))


@pytest.mark.parametrize("rate, more", [(1e42, ["--optimizer", "adamw", "--steps", "1"]), (1e39, []), (1e30, []),
                                        (1e38, ["--optimizer", "adamw"])])
def test_a_checkpoint_that_is_saved_is_sound(rate, more, corpus, tmp_path, monkeypatch):
    """The step that makes weights infinite ends the run in one line, before they are saved; a rate that would is
    refused before."""
    monkeypatch.setattr(train_module, "schedule", lambda step, config, warmup: rate)
    with pytest.raises(ValueError, match="lower --learning_rate"):
        main(flags(corpus, tmp_path / "run", *more))
    assert (tmp_path / "run").exists() and not list(tmp_path.glob("run/ckpt*"))
    for name in ("learning_rate", "muon_learning_rate", "weight_decay"):
        for value in ("1e39", "3e38", "1e30", "11"):
            with pytest.raises(ValueError, match=f"--{name}: {value} is not allowed"):
                main(flags(corpus, tmp_path / "other", f"--{name}", value))


def test_a_checkpoint_that_does_not_say_how_it_was_trained_is_not_gone_on_from(corpus, tmp_path):
    main(flags(corpus, tmp_path / "run"))
    saved = torch.load(tmp_path / "run" / "ckpt.pt")
    for name in ("dtype", "compile", "warmup"):
        del saved["state"][name]
    torch.save(saved, tmp_path / "run" / "ckpt.pt")
    with pytest.raises(ValueError, match="older version.*another --out"):
        main(flags(corpus, tmp_path / "run"))


def test_it_starts_from_a_run_folder(corpus, tmp_path):
    main(flags(corpus, tmp_path / "first"))
    argv = ["--data", str(corpus), "--held_out", "", "--out", str(tmp_path / "second"), "--steps", "1",
            "--batch_tokens", "64", "--row_tokens", "16", "--learning_rate", "1e-30",
            "--muon_learning_rate", "1e-30", "--device", "cpu"]
    with pytest.raises(FileNotFoundError, match="no run, checkpoint or base at .*nowhere"):
        main([*argv, "--init_from", str(tmp_path / "nowhere")])
    main([*argv, "--init_from", str(tmp_path / "first")])
    one, two = (restore(read_checkpoint(str(tmp_path / name / "ckpt.pt"))) for name in ("first", "second"))
    torch.testing.assert_close(weights(one), weights(two))


def test_the_embedded_corpus_is_made_where_it_is_missing(tmp_path, monkeypatch):
    """A user's first command, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    main(["--steps", "1", "--device", "cpu"])
    assert (tmp_path / "data" / "alchemy" / "gold.jsonl").exists()
    assert (tmp_path / "runs" / "train" / "ckpt.pt").exists()
    with pytest.raises(FileNotFoundError, match="godl.jsonl"):
        main(["--data", "data/alchemy/godl.jsonl", "--out", "runs/other", "--device", "cpu"])
