"""YAML files and overrides as plain data: one dialect in and out, bounded, with mistakes in one line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmfoundry.config import ConfigError, drop_replaced
from llmfoundry.settings import from_dotlist, load_settings, load_yaml, read_resolved, write_resolved
from llmfoundry.train.config import RunConfig

# Pieces that YAML, OmegaConf or both of its dialects read in a way of their own.
PIECES = st.sampled_from(
    ["${", "\\", "}", "$", "{", "a", "b.c", " ", "\n", "\t", "'", '"', ":", "#", "- ", "~", "=", "<<", "é", "🙂",
     "\x85", "1e5", "0100", "1:30", "yes", "null", ".5", ".inf", "0x1f", "1_000", "2024-01-01", "oc.env:X"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=6).map("".join)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none())
VALUES = st.recursive(
    TEXTS | NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
WORDS = st.text("abcdefgh_", min_size=1, max_size=5).filter(lambda word: word != "variables")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(WORDS, VALUES, min_size=1, max_size=4))
@example({"a": "oc.env:X", "b": ["${.inf}"], "c": "${c}", "d": "\\\\${d}"})
def test_what_is_written_resolved_is_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]
) -> None:
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_text(write_resolved(data), encoding="utf-8")
    assert read_resolved(file) == data  # by a checkpoint's reader
    assert load_yaml(file) == data  # as the YAML of a new run


def test_a_literal_dollar_brace_of_older_files_stays_literal(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("prompt: echo ${HOME}\n")
    assert read_resolved(tmp_path / "config.yaml") == {"prompt": "echo ${HOME}"}


def _load(tmp_path: Path, text: str, *overrides: str) -> dict[str, object]:
    (tmp_path / "run.yaml").write_text(text)
    return load_yaml(tmp_path / "run.yaml", list(overrides))


def test_interpolations_are_resolved_and_variables_dropped(tmp_path: Path) -> None:
    text = "variables: {d: 8}\nmodel: {d_model: '${variables.d}', note: 'd is ${.d_model}, not \\${d}'}\n"
    assert _load(tmp_path, text) == {"model": {"d_model": 8, "note": "d is 8, not ${d}"}}
    assert _load(tmp_path, text, "variables.d=9")["model"] == {"d_model": 9, "note": "d is 9, not ${d}"}


@pytest.mark.parametrize(
    ("override", "result"),
    [
        ("a.b=5", {"a": {"b": 5, "c": 2}, "l": [1, 2]}),
        ("a={d: 3}", {"a": {"b": 1, "c": 2, "d": 3}, "l": [1, 2]}),
        ("a:={d: 3}", {"a": {"d": 3}, "l": [1, 2]}),
        ("~a.b", {"a": {"c": 2}, "l": [1, 2]}),
        ("~a", {"l": [1, 2]}),
        ("l=[7]", {"a": {"b": 1, "c": 2}, "l": [7]}),
        ("l.1=7", {"a": {"b": 1, "c": 2}, "l": [1, 7]}),
        ("l[0]=7", {"a": {"b": 1, "c": 2}, "l": [7, 2]}),
        ("~l.0", {"a": {"b": 1, "c": 2}, "l": [2]}),
        ("n.m=1e-3", {"a": {"b": 1, "c": 2}, "l": [1, 2], "n": {"m": 0.001}}),
        ("t=x=y", {"a": {"b": 1, "c": 2}, "l": [1, 2], "t": "x=y"}),
    ],
)
def test_overrides_set_replace_and_delete(tmp_path: Path, override: str, result: dict[str, object]) -> None:
    assert _load(tmp_path, "a: {b: 1, c: 2}\nl: [1, 2]\n", override) == result


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "seed: is not an override; expected key=value, key:=value or ~key"),
        ("=1", "=1: is not an override"),
        ("~a.bb", "~a.bb: the file has no such key to delete (did you mean ~a.b?)"),
        ("~x", "~x: the file has no such key to delete"),
        ("l.9=1", "l.9=1: does not fit the value that is there"),
        ("a=[1", "a=[1: while parsing a flow sequence"),
        ("a=???", "a: ??? stands for a value that must be given; write a=..."),
        ("a=0777", "a=0777: line 1: 0777 is an octal number in YAML 1.1"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, "a: {b: 1}\nl: [1, 2]\n", override)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_all_numbers_that_yaml_1_1_reads_otherwise_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, "max_seq_len: 0100\nrows: 1:30\nx: [007, '010', 0, 0.5, 1:30.5]\ntime: '1:30'\n")
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1:3] for line in lines] == [
        ["line 1", "0100 is an octal number in YAML 1.1; write it in decimal, or quote it"],
        ["line 2", "1:30 is a base-60 number in YAML 1.1; write it in decimal, or quote it"],
        ["line 3", "007 is an octal number in YAML 1.1; write it in decimal, or quote it"],
        ["line 3", "1:30.5 is a base-60 number in YAML 1.1; write it in decimal, or quote it"],
    ]


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'x'}]\n" for i in range(12))
MERGES = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" if i else "m0: &m0 {x: 1}\n"
                 for i in range(12))  # fmt: skip
REFERENCES = "r0: x\n" + "".join(f"r{i}: '${{r{i - 1}}}${{.r{i - 1}}}'\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "its aliases expand to too many values"),
        (MERGES, "its aliases expand to too many values"),
        (REFERENCES, "expands to too many values"),
        ("a: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
        ("".join(" " * i + "a:\n" for i in range(200)), "is nested too deeply"),
        ("a: {{{{{{{{{{", "expected the node content"),
        ("model: &m {x: *m}", "an alias refers to what it is a part of"),
        ("l: &l [*l]", "an alias refers to what it is a part of"),
        ("model: ${model}", "its interpolation refers to itself"),
        ("a: ${b}\nb: '1 ${a}'", "its interpolation refers to itself"),
        ('a: !!python/object/apply:os.system ["true"]', "the tag tag:yaml.org,2002:python/object/apply:os.system is"),
        ("a: !!binary aGk=", "the tag tag:yaml.org,2002:binary is not allowed"),
        ("a: 1\na: 2", "the key 'a' comes twice"),
        ("? [a]\n: 1", "a key must be a plain word"),
        ("x:\n  a: ${b}", "x.a: Interpolation key 'b' not found"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("- 1", "must hold a mapping, found a list"),
        ("", "must hold a mapping, found nothing"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: '" + "x" * 2**20 + "'", "too many for a YAML file"),
        ("a: \x07", "special characters are not allowed"),
        ('a: {b: "c\\0"}', "a text holds a NUL or half a character"),
        ('"a\\ud800": 1', "a text holds a NUL or half a character"),
        ("{" + ", ".join(f"k{i}: " for i in range(20_000)) + ", k19999: }", "the key 'k19999' comes twice"),
    ],
)
def test_a_hostile_file_ends_in_one_line_at_once(tmp_path: Path, text: str, says: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, text)
    assert says in str(error.value) and "\n" not in str(error.value) and "run.yaml" in str(error.value)
    assert time.process_time() - started < 5


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run.yaml:2: starts with a tab, and YAML allows only spaces"):
        _load(tmp_path, "model:\n\tname: x\n")
    (tmp_path / "run.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="run.yaml: is not UTF-8: invalid start byte at byte 3; save it as UTF-8"):
        load_yaml(tmp_path / "run.yaml")
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="is a folder, not a YAML file; write .*/config.yaml"):
        load_yaml(tmp_path)


def test_a_pipe_is_read_and_one_that_nobody_writes_to_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train.py <(...)` is a pipe; opening one that has no writer waited for ever."""
    monkeypatch.setattr("llmfoundry.settings.PIPE_SECONDS", 0.1)
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"run.yaml: is a pipe, and nothing was written to it in 0 seconds"):
        load_yaml(tmp_path / "run.yaml")
    reading, writing = os.pipe()
    os.write(writing, b"a: 1")
    os.close(writing)
    assert load_yaml(f"/dev/fd/{reading}") == {"a": 1}
    os.close(reading)


def test_keys_are_words_even_where_yaml_has_another_idea(tmp_path: Path) -> None:
    assert _load(tmp_path, "on: 1\n2: 3\nnull: {no: 4}\n") == {"on": 1, "2": 3, "null": {"no": 4}}


def test_overrides_alone_are_plain_data() -> None:
    assert from_dotlist(["moe_num_experts=8", "a.b=[1, 2]"]) == {"moe_num_experts": 8, "a": {"b": [1, 2]}}


MIXTURE = """
model: {ffn_config: {ffn_type: mb_dmoe, ffn_hidden_size: 64, moe_num_experts: 8, moe_top_k: 2, bias: false}}
optimizer: {name: adamw, lr: 1.0e-3}
tokenizer: {name: bpe, vocab_size: 300}
train_loader: {dataset: {name: text_files, path: texts, text_key: body, split: train}}
"""


@pytest.mark.parametrize(
    ("overrides", "path", "block", "left_out"),
    [
        (["model.ffn_config.ffn_type=mptglu"], "model.ffn_config",
         {"ffn_type": "mptglu", "ffn_hidden_size": 64, "bias": False}, "moe_num_experts, moe_top_k"),
        (["model.ffn_config={ffn_type: mptmlp}"], "model.ffn_config",
         {"ffn_type": "mptmlp", "ffn_hidden_size": 64, "bias": False}, "moe_num_experts, moe_top_k"),
        (["tokenizer.name=gpt2"], "tokenizer", {"name": "gpt2"}, "vocab_size"),
        (["train_loader.dataset.name=python_stdlib"], "train_loader.dataset",
         {"name": "python_stdlib", "split": "train"}, "path, text_key"),
        (["model.ffn_config.ffn_type=mptglu", "model.ffn_config.moe_top_k=1"], "model.ffn_config",
         {"ffn_type": "mptglu", "ffn_hidden_size": 64, "bias": False, "moe_top_k": 1}, "moe_num_experts"),
        (["model.ffn_config.ffn_type=torch_dmoe"], "model.ffn_config",
         {"ffn_type": "torch_dmoe", "ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2, "bias": False}, None),
    ],
)  # fmt: skip
def test_a_choice_switched_by_an_override_drops_the_keys_of_the_other(
    tmp_path: Path, overrides: list[str], path: str, block: dict[str, object], left_out: str | None
) -> None:
    (tmp_path / "run.yaml").write_text(MIXTURE)
    settings = load_settings(tmp_path / "run.yaml", overrides)
    data, notes = drop_replaced(RunConfig, settings.data, settings.file, settings.given)
    found: object = data
    for part in path.split("."):
        assert isinstance(found, dict)
        found = found[part]
    assert found == block
    assert notes == ([f"{path}: left out {left_out}, which the new choice does not have"] if left_out else [])


def test_a_missing_key_is_looked_up_in_the_variables(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("variables: {global_seed: 17, a: {b: 2}, seed: 3}\nseed: ${global_seed}\nx: ${a.b}\ny: ${seed}\n")
    assert load_yaml(path) == {"seed": 17, "x": 2, "y": 17}
    assert load_yaml(path, ["variables.global_seed=5"]) == {"seed": 5, "x": 2, "y": 5}
