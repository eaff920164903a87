"""data/finemath/prepare.py: rows of the hub's files, in every form that `datasets` and pandas write, as documents."""
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("datasets", reason="pip install datasets")
import pyarrow as pa
import pyarrow.parquet as parquet

from data.corpus import read_corpus
from data.finemath import prepare as finemath
from data.finemath.prepare import SUBSETS, PrepareConfig, document_of, main
from tests.conftest import full_disk

CHUNKS = [{"suffix": "One.", "latent": "why"}, {"suffix": " Two.", "latent": None}]
PUBLISHED = {       # a row of each form of the paper's data, and what becomes of it
    "raw": ({"text": "One. Two.", "url": "u", "fetch_time": 7}, {"text": "One. Two."}),
    "thoughts": ({"text": "One. Two.", "chunks": [{"prefix": "", **CHUNKS[0]}, {"prefix": "One.", **CHUNKS[1]}]},
                 {"text": "One. Two.", "chunks": [{"suffix": "One.", "latent": "why"}, {"suffix": " Two."}]}),
    "wrap": ({"text": "One. Two.", "latent": "In short."}, {"text": "One. Two.", "latent": "In short."}),
    "round_1": ({"text": "One.", "chunks": [{"suffix": "One.", "latent": "z", "log_weights": [0.1, 0.2]}]},
                {"text": "One.", "chunks": [{"suffix": "One.", "latent": "z"}]}),
}


def documents(tmp_path, rows, kind, **flags):
    """What `main` makes of rows that lie in a file of this kind."""
    file, out = tmp_path / f"rows.{kind}", tmp_path / "out.jsonl"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--source", str(file), "--out", str(out), *(f"--{name}={value}" for name, value in flags.items())])
    return read_corpus(str(out))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("form", PUBLISHED)
def test_a_row_of_each_published_form_becomes_a_document(tmp_path, form, kind):
    row, document = PUBLISHED[form]
    assert documents(tmp_path, [row], kind) == [document]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_forms_in_one_file_come_with_nulls_in_place_of_absent_keys(tmp_path, kind):
    rows = [row for row, _ in PUBLISHED.values()]
    rows = [{key: row.get(key) for key in ("text", "latent", "chunks", "url")} for row in rows]
    assert documents(tmp_path, rows, kind) == [document for _, document in PUBLISHED.values()]


def test_pandas_and_datasets_write_files_that_are_read(tmp_path):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    rows, wanted = [PUBLISHED["thoughts"][0], PUBLISHED["raw"][0]], [PUBLISHED["thoughts"][1], PUBLISHED["raw"][1]]
    rows = [{key: row.get(key) for key in ("text", "chunks")} for row in rows]
    pandas.DataFrame(rows).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    pandas.DataFrame(rows).to_parquet(tmp_path / "b.parquet")
    datasets.Dataset.from_list(rows).to_json(tmp_path / "c.jsonl.gz", compression="gzip")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.parquet", "c.jsonl.gz", "d.parquet"):
        main(["--source", str(tmp_path / name), "--out", str(tmp_path / f"{name}.out")])
        assert read_corpus(str(tmp_path / f"{name}.out")) == wanted, name


def test_what_comes_late_or_in_another_shard_is_read_as_it_stands(tmp_path, capsys):
    """No schema is guessed from the first rows: keys, nulls and types change, shards may be empty, dates are text."""
    thought = {"text": "a b", "chunks": [{"suffix": "a"}, {"suffix": " b", "latent": "z"}], "answer": "2024-01-01"}
    rows = [{"text": "a", "chunks": None}] * 3 + [{"text": "b", "answer": 72}, {"text": "b", "answer": 72.0}, thought]
    (tmp_path / "in [1]").mkdir()
    folder = tmp_path / "in [1]"
    (folder / "a b[2].jsonl").write_text("".join(json.dumps(row) + "\r\n\n" for row in rows))
    (folder / "b.jsonl").write_text("")
    (folder / "c.parquet").write_bytes(b"")
    (folder / "c.parquet").unlink()
    parquet.write_table(pa.table({"text": pa.array(["c"]), "latent": pa.nulls(1)}), folder / "c.parquet")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "d.parquet")
    pa_rows = pa.table({"text": pa.array(["d"]).dictionary_encode(), "latent": pa.array(["z"], pa.large_string())})
    parquet.write_table(pa_rows, folder / "e.parquet")
    (folder / "f.JSON").write_text("\ufeff" + json.dumps([{"text": "e\u2028"}, {"text": "f"}]))
    (folder / "old.jsonl.run").mkdir()
    (folder / "old.jsonl.run" / "counts.json").write_text("{}")
    main(["--source", str(folder), "--out", str(tmp_path / "out.jsonl")])
    found = read_corpus(str(tmp_path / "out.jsonl"))
    assert [d["text"] for d in found] == ["a", "a", "a", "b", "b", "a b", "c", "d", "e\u2028", "f"]
    assert [d.get("answer") for d in found[3:6]] == ["72", "72", "2024-01-01"] and found[7]["latent"] == "z"
    assert found[5]["chunks"] == thought["chunks"]


def test_parts_of_a_folder_that_are_written_into_it_do_not_overlap(tmp_path):
    """A corpus of ours in the folder is none of its files, but where it is named."""
    (tmp_path / "part.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(4)))
    for name, more in (("a", []), ("b", ["--skip", "2"])):
        main(["--source", str(tmp_path), "--out", str(tmp_path / f"{name}.jsonl"), "--limit", "2", *more])
    main(["--source", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c.jsonl")])
    for name, texts in (("a", ["t0", "t1"]), ("b", ["t2", "t3"]), ("c", ["t2", "t3"])):
        assert [document["text"] for document in read_corpus(str(tmp_path / f"{name}.jsonl"))] == texts


@pytest.mark.parametrize("column, chunks", [
    (["a", None], [{"suffix": "a"}]), ([{"suffix": "a"}, None], [{"suffix": "a"}]), ([], None), ([None], None),
    ({"suffix": None, "latent": None}, None), ([{"suffix": None, "latent": None}], None),
    ({"suffix": ["a"], "latent": None}, [{"suffix": "a"}]), ([{"suffix": "a", "latent_ids": [9]}], [{"suffix": "a"}])])
def test_nulls_among_chunks_are_as_good_as_nothing(column, chunks):
    record = document_of({"text": "a", "chunks": column}, PrepareConfig(), Counter())
    assert record == ({"text": "a", "chunks": chunks} if chunks else {"text": "a"})


@pytest.mark.parametrize("column", [[{"suffix": "a"}, {"suffix": "b", "latent": "z", "given": True}],
                                    {"suffix": ["a", "b"], "latent": [None, "z"], "given": [None, True]}])
def test_chunks_are_structs_or_a_struct_of_lists(column):
    record = document_of({"text": "ab", "chunks": column}, PrepareConfig(), finemath.Counter())
    assert record["chunks"] == [{"suffix": "a"}, {"suffix": "b", "latent": "z", "given": True}]


def test_a_text_may_stand_in_a_struct():
    row = {"meta": {"body": {"text": "ab"}, "note": None}, "a.b": "cd"}
    for name, text in (("meta.body.text", "ab"), ("a.b", "cd"), ("meta.note", None), ("meta.body.text.more", None)):
        document = document_of(row, PrepareConfig(text=name, latent="meta.body.text"), Counter())
        assert document == (None if text is None else {"text": text, "latent": "ab"})
    with pytest.raises(ValueError, match="no column 'other.text'"):
        document_of(row, PrepareConfig(text="other.text"), Counter())
    with pytest.raises(ValueError, match='the "answer" is a text or a number'):
        document_of({"text": "ab", "answer": ["8", "9"]}, PrepareConfig(), Counter())


def test_chunks_may_be_a_list_of_texts():
    record = document_of({"text": "ab", "chunks": ["a", "b"]}, PrepareConfig(), finemath.Counter())
    assert record["chunks"] == [{"suffix": "a"}, {"suffix": "b"}]


def test_the_text_is_that_of_the_chunks_where_published_ones_lost_a_line_break(tmp_path, capsys):
    rows = [{"text": "\nOne. Two.", "chunks": CHUNKS}]
    assert documents(tmp_path, rows, "parquet")[0]["text"] == "One. Two."
    assert "1 with the text of their chunks" in capsys.readouterr().out


def test_counts_are_those_of_the_corpus_that_was_written(tmp_path, capsys):
    """Documents, chunks, tokens and thoughts; rows without text are left out and counted, an empty thought is none."""
    empty = {"text": "a b", "chunks": [{"suffix": "a b", "latent": ""}]}
    rows = [PUBLISHED["thoughts"][0], {"text": " "}, {"text": None}, empty]
    assert len(documents(tmp_path, rows, "parquet")) == 2
    line = capsys.readouterr().out
    for figure in ("2 documents", "3 chunks", "1 thoughts", "6 tokens", "1 tokens of thoughts", "4 rows",
                   "2 without text, left out"):
        assert figure in line, line


def test_another_column_holds_the_text_and_slices_do_not_overlap(tmp_path):
    rows = [{"content": f"text {i}", "n": i} for i in range(10)]
    first = documents(tmp_path, rows, "jsonl", text="content", limit=4)
    (tmp_path / "second").mkdir()
    second = documents(tmp_path / "second", rows, "jsonl", text="content", skip=4)
    assert [record["text"] for record in first + second] == [row["content"] for row in rows]


KILLED = """
import os, sys
sys.argv[0] = "prepare.py"
from data.finemath import prepare
prepare.SAVE_EVERY, number, document_of = 100, 0, prepare.document_of
def dies(row, config, counts):
    if counts["rows"] == int(os.environ["DIES_AT"]):
        os.kill(os.getpid(), 9)
    return document_of(row, config, counts)
prepare.document_of = dies
prepare.main(sys.argv[1:])
"""


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, kind):
    texts = [f"Text {i}. It goes on." for i in range(700)]
    rows = [{"text": text, "chunks": [{"suffix": text, "latent": "z"}] if i % 3 else None}
            for i, text in enumerate(texts)]
    whole = documents(tmp_path, rows, kind, skip=10, limit=600)
    command = [sys.executable, "-c", KILLED, "--source", str(tmp_path / f"rows.{kind}"), "--out",
               str(tmp_path / "again.jsonl"), "--skip", "10", "--limit", "600"]
    for dies_at in (50, 333, 599, 10 ** 9):
        done = subprocess.run(command, env=os.environ | {"DIES_AT": str(dies_at)}, capture_output=True, text=True)
        assert done.returncode == (0 if dies_at == 10 ** 9 else -9), done.stderr
        assert (tmp_path / "again.jsonl").exists() == (dies_at == 10 ** 9)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert "600 documents" in done.stdout and len(whole) == 600


@pytest.mark.parametrize("flags, message", [
    ({"source": "nothing/here/at/all"}, "names no parquet or JSON-lines files"),
    ({"text": "body"}, "no column 'body'; name it by --text, of text"),
    ({"encoding": "klingon"}, "unknown"),
    ({"limit": "-1"}, "--limit"),
    ({"source": "data/not_here.jsonl"}, "names no parquet or JSON-lines files"),
])
def test_what_cannot_be_read_is_one_line_and_writes_nothing(tmp_path, flags, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    argv = {"source": str(tmp_path / "a.jsonl"), "out": str(tmp_path / "out.jsonl")} | flags
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        main([f"--{name}={value}" for name, value in argv.items()])
    assert "\n" not in str(error.value) and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("chunks", ["ab", '["a", "b"]', [1, 2], {"suffix": "ab", "latent": "zz"}, [{"chunk": "ab"}],
                                    ["a"], [{"suffix": "ab"}, {"suffix": "c"}], [["a"]], 3])
def test_chunks_that_are_none_or_do_not_cover_the_text_are_refused(chunks):
    """A good text is never shortened, or left out, for chunks that are something else."""
    with pytest.raises(ValueError, match="chunk"):
        document_of({"text": "ab", "chunks": chunks}, PrepareConfig(), finemath.Counter())


def test_a_source_that_changed_does_not_mix_into_what_is_there(tmp_path):
    documents(tmp_path, [{"text": "a"}], "jsonl")
    (tmp_path / "rows.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(ValueError, match="holds a run with other settings .files "):
        main(["--source", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")])


def test_a_data_set_of_the_hub_gives_the_files_of_its_subset_and_split(tmp_path, monkeypatch):
    """As its README declares them, here of a folder on the disk, which the package reads in the same way."""
    folder = tmp_path / "hub"
    (folder / "one").mkdir(parents=True)
    parquet.write_table(pa.table({"text": ["a", "b"]}), folder / "one" / "x-0.parquet")
    (folder / "two.jsonl").write_text('{"text": "c"}\n')
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: one/*.parquet\n"
        "- config_name: two\n  data_files:\n  - split: test\n    path: two.jsonl\n---\n")
    assert finemath.hub_files(str(folder), "one", "train") == [str(folder / "one" / "x-0.parquet")]
    assert finemath.hub_files(str(folder), "two", "test") == [str(folder / "two.jsonl")]
    with pytest.raises(ValueError, match="in split train, of test; give --split"):
        finemath.hub_files(str(folder), "two", "train")
    monkeypatch.setattr(finemath, "SUBSETS", {"thoughts": "org/name:one"})
    hub_files = finemath.hub_files
    monkeypatch.setattr(finemath, "hub_files", lambda name, *more: hub_files(str(folder), *more))
    main(["--source", "thoughts", "--out", str(tmp_path / "out.jsonl")])
    assert [record["text"] for record in read_corpus(str(tmp_path / "out.jsonl"))] == ["a", "b"]


def test_the_same_command_on_a_finished_corpus_says_its_counts_again(tmp_path, capsys):
    """Also where the source is gone by then."""
    documents(tmp_path, [{"text": "a"}], "jsonl")
    first = capsys.readouterr().out
    (tmp_path / "rows.jsonl").unlink()
    main(["--source", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("damage", [lambda run: (run / "state.json").write_text("{"),
                                    lambda run: (run / "counts.json").unlink()])
def test_a_run_folder_that_is_damaged_begins_anew(tmp_path, damage):
    rows = [{"text": "a"}, {"text": "b"}]
    documents(tmp_path, rows, "jsonl")
    (tmp_path / "out.jsonl").unlink()
    damage(tmp_path / "out.jsonl.run")
    main(["--source", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    assert read_corpus(str(tmp_path / "out.jsonl")) == rows


@pytest.mark.parametrize("content, message", [
    (b'{"text": "a"}\n{"text": \n', "a.jsonl, row 2: "), ('{"text": "a"}'.encode("utf-16"), "row 1"),
    (b'{"text": 5}', "row 1: the \"text\" of a document is a text, not 5"), (b"", "has no document with text"),
    (b'"a"\n', "row 1: a row is an object"), (b'{"text": "\xff"}', "row 1 is not UTF-8"),
    (b"null\n{}", "row 1: a row is an object"),
    (b"[" * 5000 + b"\n", "row 1: "), (b'{"text": "a"}\n' + b'{"a":' * 5000, "row 2: ")])
def test_a_broken_file_is_named_with_its_row_and_a_mended_one_is_taken(tmp_path, content, message):
    """In one line; as long as nothing was kept, other settings and another file are welcome under the same --out."""
    (tmp_path / "a.jsonl").write_bytes(content)
    argv = ["--source", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(ValueError) as error:
        main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n{"body": "\\ud83d"}')
    main([*argv, "--text", "body"])
    assert read_corpus(str(tmp_path / "out.jsonl")) == [{"text": "a"}]


def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * 20}) + "\n" for i in range(400)))
    argv = ["--source", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    with full_disk(20_000), pytest.raises(OSError, match="could not write .*out.jsonl.*make room"):
        main(argv)
    main(argv)
    assert len(read_corpus(str(tmp_path / "out.jsonl"))) == 400


def test_every_subset_of_the_paper_has_a_name():
    assert {"finemath", "held_out", "warm", "thoughts", "wrap", "wrap_cot", "raw", "round_1", "round_3"} <= {*SUBSETS}
