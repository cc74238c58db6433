"""A table gives the texts of one column, whatever the others hold; what cannot be read is named with its row."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmfoundry.config import ConfigError, check
from llmfoundry.data import DatasetConfig, files, tables

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def read(path: Path, **keys: object) -> list[str]:
    """All documents of a dataset."""
    config = check(DatasetConfig, {"name": "text_files", "path": str(path), "validation_fraction": 0} | keys)
    return list(config.build().documents())


def message(path: Path, **keys: object) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


LATE = {
    "a key below": ({"meta": {"source": "x"}}, {"meta": {"source": "x", "link": "y"}}),
    "a key": ({}, {"extra": 1}),
    "a date": ({"date": "2024-01-01"}, {"date": "n/a"}),
    "null": ({"meta": None}, {"meta": {"url": "x"}}),
    "a number": ({"id": 1}, {"id": "one"}),
    "a list": ({"tags": []}, {"tags": [1, ["two"]]}),
    "a large number": ({"id": 1}, {"id": 2**80}),
}


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("ending", [".jsonl", ".NDJSON", ".json", ".jsonl.zst"])
def test_other_columns_may_change_their_type(tmp_path: Path, late: str, ending: str) -> None:
    early, then = LATE[late]
    texts = [f"{i} " + "word " * 2000 for i in range(1100)]  # 11 MB: beyond what a guess of the types looks at
    data = lines(*({"text": text} | (early if i < 1000 else then) for i, text in enumerate(texts)))
    path = tmp_path / f"a{ending}"
    path.write_bytes(zstandard.compress(data) if ending.endswith(".zst") else data)
    assert read(path) == texts


TEXTS = ["first", 'two\nlines, "quoted"', "drei é 🙂", "tab\tand , comma", "last"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
QUOTED = '"two\nlines, ""quoted"""'
CSV = f'id,text\r\n0,first\r\n1,{QUOTED}\r\n2,drei é 🙂\r\n3,"tab\tand , comma"\r\n\r\n4,last\r\n'
WRITTEN = {
    ".jsonl": lines(*ROWS),
    ".ndjson": b"\xef\xbb\xbf" + lines(*ROWS[:2]) + b"\n  \r\n" + lines(*ROWS[2:]).rstrip(),
    ".json": json.dumps(ROWS).encode(),
    ".json, indented": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    ".json, lines": lines(*ROWS),
    ".json, values": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    ".json, mark": b"\xef\xbb\xbf  [" + b" ,\n".join(json.dumps(row).encode() for row in ROWS) + b"]\n\n",
    ".csv": CSV.encode(),
    ".csv, mark": b"\xef\xbb\xbf" + "\n".join(["text", *TEXTS[:1]]).encode(),
    ".tsv": f'id\ttext\n0\tfirst\n1\t{QUOTED}\n2\tdrei é 🙂\n3\t"tab\tand , comma"\n4\tlast'.encode(),
}


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("packing", ["", *PACKERS])
@pytest.mark.parametrize("upper", [False, True])
def test_every_form_and_packing_gives_the_same_texts(tmp_path: Path, form: str, packing: str, upper: bool) -> None:
    ending = form.partition(",")[0] + packing
    path = tmp_path / f"a{ending.upper() if upper else ending}"
    path.write_bytes(PACKERS[packing](WRITTEN[form]) if packing else WRITTEN[form])
    assert read(path) == (TEXTS[:1] if form == ".csv, mark" else TEXTS)


@pytest.mark.parametrize("ending", [".txt", ".MD", *(f".txt{packing}" for packing in PACKERS), ".md.GZ"])
def test_plain_text_is_one_document(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    data = "one é\r\ntwo\n".encode()
    path.write_bytes(PACKERS.get(path.suffix.lower(), bytes)(data))
    assert read(path) == ["one é\r\ntwo\n"]


def test_a_folder_reads_all_kinds_and_names_the_others(tmp_path: Path) -> None:
    names = ["a.txt", "B.TXT", "c.json", "d.ndjson", "e.md", "f.csv", "g.txt.gz", "h.jsonl.bz2", "i.tsv.xz"]
    for name in names:
        kind = files.kind_of(Path(name))
        assert kind is not None
        text = {"json": '{"text": "NAME"}', "lines": '{"text": "NAME"}', "csv": "text\nNAME", "tsv": "text\nNAME"}
        data = text.get(kind.format, "NAME").replace("NAME", name).encode()
        (tmp_path / name).write_bytes(PACKERS.get(kind.compression, bytes)(data))
    for name in ("x.png", "y.PNG", "z.parquet.gz", "LICENSE", "README.md", ".hidden.txt"):
        (tmp_path / name).write_bytes(b"no text")
    assert sorted(read(tmp_path)) == sorted(names)
    source = check(DatasetConfig, {"name": "text_files", "path": str(tmp_path), "validation_fraction": 0}).build()
    assert source.summary.endswith(
        "skipped: 1 without ending (e.g. LICENSE), 1 README.md (e.g. README.md), 2 .png (e.g. x.png), "
        "1 .gz (e.g. z.parquet.gz)"
    )


def test_folders_that_a_glob_matches_are_read(tmp_path: Path) -> None:
    """Spark writes a folder `x.parquet` of parts."""
    for name in ("one.parquet", "two.parquet"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"text": [name]}), tmp_path / name / "part-00000.snappy.parquet")
        (tmp_path / name / "_SUCCESS").touch()
    assert read(tmp_path / "*.parquet") == ["one.parquet", "two.parquet"] == read(tmp_path)
    assert read(tmp_path / "one.parquet") == ["one.parquet"]


NESTED = {"doc": {"id": 1, "text": "here"}, "text": "there", "a.b": {"c": "deep"}, "a": {"b.c": "other"}}


def test_a_dot_leads_into_nested_columns_and_a_literal_name_wins(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(NESTED))
    pq.write_table(pa.Table.from_pylist([NESTED]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name, text_key="doc.text") == ["here"]
        assert read(tmp_path / name, text_key="a.b.c") == ["other"], "the shortest first name that leads there"
        known = "'doc.id', 'doc.text', 'text', 'a.b.c', 'a.b.c'"
        assert f"'doc.body' is not among {known}" in message(tmp_path / name, text_key="doc.body")
    both = NESTED | {"doc.text": "literal"}
    (tmp_path / "a.jsonl").write_bytes(lines(both))
    pq.write_table(pa.Table.from_pylist([both]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name, text_key="doc.text") == ["literal"]


def columns() -> dict[str, pa.Array]:
    texts = ["one é", "", "three"]
    return {
        "string": pa.array(texts),
        "large_string": pa.array(texts, pa.large_string()),
        "string_view": pa.array(texts, pa.string_view()),
        "binary": pa.array([text.encode() for text in texts]),
        "large_binary": pa.array([text.encode() for text in texts], pa.large_binary()),
        "dictionary": pa.array(texts).dictionary_encode(),
    }


@pytest.mark.parametrize("kind", columns())
@pytest.mark.parametrize("group", [1, 2, 1000])
def test_parquet_text_may_be_stored_in_any_way(tmp_path: Path, kind: str, group: int) -> None:
    table = pa.table({"n": [1, 2, 3], "text": columns()[kind]})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=group)
    for name in ("a", "c"):
        pq.write_table(table.slice(0, 0), tmp_path / f"{name}.parquet")
    with pq.ParquetWriter(tmp_path / "d.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0), table):
            writer.write_table(part)
    assert read(tmp_path) == ["one é", "three"] * 3


def test_tables_without_rows_hold_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"other": pa.array([], pa.int64())}), tmp_path / "a.parquet")
    for name, data in {"b.jsonl": b"\n\n", "c.json": b"[]", "d.csv": b"text\n", "e.json": b" \n"}.items():
        (tmp_path / name).write_bytes(data)
    assert "holds no text" in message(tmp_path)
    (tmp_path / "z.txt").write_text("text")
    assert read(tmp_path) == ["text"]


BAD = {
    "value.jsonl": (lines(*ROWS[:3]) + b"\n{no}\n", "row 3: cannot be read: Expecting property name", "(line 5)"),
    "cut.jsonl": (lines(*ROWS)[:-5], "row 4: cannot be read: Unterminated string", "(line 5)"),
    "list.jsonl": (lines(ROWS[0], ["text"]), "row 1: is a list, not a mapping with 'text': ['text']", "(line 2)"),
    "number.jsonl": (lines(ROWS[0], {"text": 4}), "row 1: 'text' is 4, not text", "(line 2)"),
    "key.jsonl": (lines(ROWS[0], {"txt": "x"}), "row 1: 'text' is not among 'txt'", "(line 2)"),
    "chats.jsonl": (
        lines(ROWS[0], {"messages": []}),
        "row 1: 'text' is not among 'messages'; for conversations, set name: finetuning in the loader",
        "(line 2)",
    ),
    "nothing.jsonl": (lines(ROWS[0], {}), "row 1: 'text' is not among no columns at all", "(line 2)"),
    "surrogate.jsonl": (lines(ROWS[0]) + b'{"text": "x\\ud83d"}\n', "row 1: 'text' has a lone surrogate", "(line 2)"),
    "deep.jsonl": (lines(ROWS[0]) + b"[" * 200_000 + b"\n", "row 1: cannot be read: ", "(line 2)"),
    "cells.csv": (b"id,text\n1,a\n2\n", "row 1: 'text' is not among 'id'", "(line 3)"),
    "many.csv": (b"text,id\na,1,,\nIt is late, he said,2\n", "row 1: has 3 cells, and the header has 2", "(line 3)"),
    "lines.csv": (b'text,id\n"a\nb",1\n,2,\n"c\nd"\n', None, ""),
    "number.json": (json.dumps([*ROWS, {"text": 4}]).encode(), "row 5: 'text' is 4, not text", ""),
}
BROKEN = {
    "cut.json": (json.dumps(ROWS).encode()[:-1], "row 5: cannot be read: "),
    "comma.json": (b'[{"text": "a"} {"text": "b"}]', "row 1: cannot be read: expected ',' or ']', found '{'"),
    "more.json": (b'[{"text": "a"}] x', "row 1: cannot be read: text after the array: 'x'"),
    "open.csv": (b'text,id\na,1\n"b,2\nc,3\n', "row 1: cannot be read: the row that starts on line 3 has a quote"),
    "header.csv": (b'text,"id\na,1\n', "row 0: cannot be read: the row that starts on line 1 has a quote"),
    "twice.csv": (b"text,id,text\na,1,b\n", "2 columns are named 'text'"),
    "value.json": (json.dumps([*ROWS, "x" * 99999]).encode()[:-2] + b"\n, 3]", "row 5: cannot be read: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    data, why, line = BAD[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "z.txt").write_text("after")
    if why is None:
        assert read(tmp_path) == ["a\nb", "c\nd", "after"]
        return
    found = message(tmp_path)
    assert f"{name}: {why}" in found and line in found and "skip_bad_rows: N skips up to N such rows" in found
    texts = read(tmp_path, skip_bad_rows=1)
    assert texts[-1] == "after" and len(texts) > 1
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith(f"text_files-train: skipped 1 of at most 1 bad rows; the first: {tmp_path / name}: {why}")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_the_row(tmp_path: Path, name: str) -> None:
    data, why = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    assert f"dataset.path: {tmp_path / name}: {why}" in message(tmp_path)
    assert f"dataset.path: {tmp_path / name}: {why}" in message(tmp_path, skip_bad_rows=9)


def test_no_more_bad_rows_are_skipped_than_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*ROWS[:2], 1, 2) + '{"text": "é"}\n'.encode("latin-1"))
    pq.write_table(pa.table({"text": [b"fine", b"\xff", None]}), tmp_path / "b.parquet")
    assert "a.jsonl: is not UTF-8" in message(tmp_path)
    assert read(tmp_path, skip_bad_rows=5) == [*TEXTS[:2], "fine"]
    found = message(tmp_path, skip_bad_rows=4)
    assert (
        "dataset.skip_bad_rows: " in found and "b.parquet: row 2: 'text' is None, not text; this is bad row 5" in found
    )
    assert "b.parquet: row 1: 'text' is not UTF-8 (byte 0)" in message(tmp_path, skip_bad_rows=3)
    strict, lenient = (
        check(DatasetConfig, {"name": "text_files", "path": str(tmp_path), "text_key": "text", "skip_bad_rows": n})
        for n in (5, 9)
    )
    assert strict.build().fingerprint == lenient.build().fingerprint, "the same documents"


@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.string()), pa.null(), pa.struct([("x", pa.string())])])
def test_a_parquet_column_that_is_no_text_is_named(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array([None], kind)}), tmp_path / "a.parquet")
    assert "a.parquet: row 0: 'text' is None, not text" in message(tmp_path)


WIDE = {
    "utf-16": "is UTF-16 (by its byte order mark)",
    "utf-32": "is UTF-32 (by its byte order mark)",
    "utf-16le": "looks like UTF-16 without a byte order mark",
    "utf-16be": "looks like UTF-16 without a byte order mark",
    "utf-32le": "looks like UTF-32 without a byte order mark",
    "utf-32be": "looks like UTF-32 without a byte order mark",
}


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl.gz"])
def test_wide_encodings_are_named_with_the_right_advice(tmp_path: Path, encoding: str, ending: str) -> None:
    text = '{"text": "a line of text"}\n' * 9
    data = text.encode(encoding)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    found = message(tmp_path)
    command = found[found.index("convert it: ") + len("convert it: ") : found.index(", or take it out")]
    assert WIDE[encoding] in found and "latin1" not in found
    made = subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False)
    (new,) = tmp_path.glob("new*")
    assert made.returncode == 0 and new.read_text(encoding="utf-8").removeprefix("\ufeff") == text


def test_zeros_in_a_text_are_no_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\0b and so on" * 9)
    (tmp_path / "b.txt").write_bytes(b"\0" * 8)
    assert len(read(tmp_path)) == 2


BOMBS = {
    "line.jsonl.gz": (b'{"text": "', b"x", "has a line of more than 1,048,576 bytes, the longest that is read"),
    "line.ndjson.zst": (b'{"text": "', b"x", "has a line of more than 1,048,576 bytes, the longest that is read"),
    "value.json.xz": (b'[{"text": "', b"x", "a value has more than 1,048,576 characters"),
    "cell.csv.bz2": (b'text\n"', b"x", "a line has more than 1,048,576 bytes"),
    "cells.csv.gz": (b'text\n"', b"x\n", "starts on line 2: field larger than field limit"),
    "text.txt.gz": (b"", b"x", "unpacks to more than "),
    "text.md.zst": (b"", b"\n", "unpacks to more than "),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_archive_never_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    start, filling, why = BOMBS[name]
    monkeypatch.setattr(files, "LINE_BYTES", 2**20)
    monkeypatch.setattr(tables, "LINE_BYTES", 2**20)
    if "unpacks" in why:
        monkeypatch.setattr(files, "TEXT_BYTES", 2**20)
    data = start + filling * ((2**26 - 2**16) // len(filling))
    (tmp_path / name).write_bytes(PACKERS[Path(name).suffix](data))
    del data
    tracemalloc.start()
    found = message(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{name}: " in found and why in found
    assert peak < 2**25, "of contents of 2**26 bytes"


def test_a_long_line_can_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_BYTES", 100)
    monkeypatch.setattr(tables, "LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}, {"text": "x" * 3_000_000}, {"text": "b"}))
    assert "has a line of more than 100 bytes" in message(tmp_path)
    assert read(tmp_path, skip_bad_rows=1) == ["a", "b"]


def test_a_cut_archive_is_named_before_it_is_read(tmp_path: Path) -> None:
    for packing, pack in PACKERS.items():
        for name in (f"a.txt{packing}", f"a.json{packing}"):
            (tmp_path / name).write_bytes(pack(lines(*ROWS) * 9)[:-6])
            assert f"{name}: cannot be read: " in message(tmp_path / name)


def test_zstd_frames_follow_one_another(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    frames = [zstandard.compress(lines(row)) for row in ROWS]
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + frames[0] + skippable + b"".join(frames[1:]))
    assert read(tmp_path) == TEXTS
