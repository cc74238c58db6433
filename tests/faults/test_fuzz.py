"""Almost valid inputs of every kind end in the documented error, within 10 s and 1 GB, and nothing is written.

`make test` tries a few of each kind, the same each time. `make soak` sets FAULTS_INPUTS, the number in all.
"""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import gguf
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import of_bytes, of_json, of_text
from safetensors.torch import save_file
from small_run import SETTINGS, copied
from transformers import PreTrainedTokenizerBase

import llmfoundry.callbacks  # noqa: F401  registers all monitors and loggers
from llmfoundry.checkpoint.finding import Found
from llmfoundry.checkpoint.index import read_index
from llmfoundry.checkpoint.manifest import MANIFEST, DamagedError, read_manifest
from llmfoundry.checkpoint.reading import read_one
from llmfoundry.cli.quick_check import mistakes_in
from llmfoundry.config import ConfigError, check
from llmfoundry.data.mds import MDSFolder
from llmfoundry.data.mds_write import MDSWriter
from llmfoundry.data.packing import TokenStream
from llmfoundry.data.tables import check_parquet, read_table
from llmfoundry.data.tokenizer import TokenizerConfig, train_bpe
from llmfoundry.eval.generate import encoded
from llmfoundry.hf.family import read_config
from llmfoundry.hf.files import DTYPES, Folder, read_header
from llmfoundry.hf.generation import stop_tokens
from llmfoundry.hf.gguf import GGUFFile
from llmfoundry.hf.pretrained import read_settings
from llmfoundry.hf.tokenizer import tokenizer_of
from llmfoundry.integrations.foundry_yaml import translate
from llmfoundry.settings import load_settings
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Duration

KINDS = 14
SOAK = int(os.environ.get("FAULTS_INPUTS", "0"))
PER_KIND = -(-SOAK // KINDS) if SOAK else 25
SECONDS, GIB = 10, 2**30
fuzzed = settings(
    max_examples=PER_KIND, derandomize=not SOAK, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


class Used(NamedTuple):
    """By one input."""

    seconds: float
    bytes: int


WORST: list[Used] = []


@pytest.fixture(scope="module", autouse=True)
def _say_what_was_used() -> Iterator[None]:
    """For the record in docs/reliability.md."""
    yield
    print(f"\n{len(WORST)} inputs, at worst {max(used.seconds for used in WORST):.1f} s and "
          f"{max(used.bytes for used in WORST) / 2**20:.0f} MiB")  # fmt: skip


class TooSlow(Exception):
    """An input took more than SECONDS."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Within, no more than SECONDS and 1 GB are used, and no file of a folder changes or appears."""
    before, peak = _files(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
    assert _files(folder) == before
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    WORST.append(Used(time.monotonic() - begun, grown * 1024))
    assert grown < GIB // 1024


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)
    return file


def _refused(read: Callable[[], object], error: type[Exception], names: Path | None = None) -> bool:
    """Whether an input is refused, by an error of this very kind, which names the file."""
    try:
        read()
    except error as found:
        assert str(found).strip()
        assert names is None or str(names) in str(found), found
        return True
    return False


def _checked(file: Path, overrides: list[str]) -> None:
    data = translate(load_settings(file, overrides).data)[0]
    mistakes_in(data)
    check(RunConfig, data)


@fuzzed
@given(text=of_text(SETTINGS))
def test_yaml(scratch: Path, text: str) -> None:
    file = _write(scratch / "run.yaml", text)
    with bounded(scratch):
        _refused(lambda: _checked(file, ["save_folder=x"]), ConfigError)


OVERRIDES = [
    "model.d_model=64", "max_duration=10ba", "optimizer.betas=[0.9, 0.95]", "~eval_loader", "model:={name: causal_lm}",
    "train_loader.dataset.name=synthetic", "algorithms.gradient_clipping.clipping_threshold=1e-3",
    "seed=${max_seq_len}", "optimizer.betas.0=0.5", "callbacks={lr_monitor: {}}",
]  # fmt: skip


@fuzzed
@given(words=st.lists(st.sampled_from(OVERRIDES).flatmap(of_text), min_size=1, max_size=3))
def test_overrides(scratch: Path, words: list[str]) -> None:
    file = _write(scratch / "base.yaml", SETTINGS)
    with bounded(scratch):
        _refused(lambda: _checked(file, words), ConfigError)


@fuzzed
@given(text=st.sampled_from(["10ba", "1ep", "5e9tok", "0.1dur", "100sp"]).flatmap(of_text))
def test_time_strings(scratch: Path, text: str) -> None:
    with bounded(scratch):
        _refused(lambda: Duration.parse(text), ValueError)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
}


@fuzzed
@given(text=of_json(HEADER), surplus=st.sampled_from([0, 0, 0, 1, 8]), wrong=st.sampled_from([0, 0, 0, 1, -1, 2**40]))
def test_safetensors_headers_are_refused_as_by_the_library(scratch: Path, text: str, surplus: int, wrong: int) -> None:
    head = text.encode(errors="surrogatepass")
    length = max(0, len(head) + wrong)
    file = _write(scratch / "a.safetensors", struct.pack("<Q", length) + head + bytes(34 + surplus))
    with bounded(scratch):
        refused = _refused(lambda: read_header(file), ConfigError, file)
    try:
        with safetensors.safe_open(file, "pt") as opened:
            theirs = {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
    except Exception:  # of several kinds, as its versions differ
        assert refused
        return
    # Weights of a quantised kind are refused here; the rest of what the library reads is read.
    assert not refused or not set(theirs.values()) <= set(DTYPES) or _is_lenient(text)


def _is_lenient(text: str) -> bool:
    """Whether the library passes over what is refused here: metadata or tensors given twice, numbers that are none."""
    try:
        json.loads(text, object_pairs_hook=_without_twice, parse_constant=_none)
    except ValueError:
        return True
    return False


def _none(word: str) -> None:
    raise ValueError(word)


def _without_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("twice")
    return dict(pairs)


@fuzzed
@given(data=st.data())
def test_manifests(run: Path, scratch: Path, data: st.DataObject) -> None:
    valid = json.loads((run / "checkpoints" / "step-6" / MANIFEST).read_text())
    file = _write(scratch / "manifest" / MANIFEST, data.draw(of_json(valid)))
    with bounded(scratch):
        _refused(lambda: read_manifest(file.parent), DamagedError, file)


@fuzzed
@given(data=st.data())
def test_indexes_of_tensors(run: Path, scratch: Path, data: st.DataObject) -> None:
    valid = json.loads((run / "checkpoints" / "step-6" / "tensors.json").read_text())
    valid["tensors"] = dict(list(valid["tensors"].items())[:5])
    file = _write(scratch / "index" / "tensors.json", data.draw(of_json(valid)))
    with bounded(scratch):
        _refused(lambda: read_index(file.parent), ValueError, file)


@fuzzed
@given(data=st.data())
def test_checkpoints(run: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["trainer.json", "config.yaml", "tensors.json", MANIFEST]))
    checkpoint = run.parent / "fuzzed" / "step-6"
    if not checkpoint.exists():
        copied(run, "fuzzed-run")
        (run.parent / "fuzzed-run" / "checkpoints").rename(checkpoint.parent)
    text = (run / "checkpoints" / "step-6" / name).read_text()
    _write(checkpoint / name, data.draw(of_text(text)))
    with bounded(checkpoint):
        _refused(lambda: read_one(Found(checkpoint, str(checkpoint)), "texts"), DamagedError, checkpoint)
    _write(checkpoint / name, text)


@fuzzed
@given(data=st.data())
def test_indexes_of_safetensors(scratch: Path, data: st.DataObject) -> None:
    folder = scratch / "theirs"
    names = {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}
    if not folder.exists():
        folder.mkdir()
        for name, file in names.items():
            save_file({name: torch.zeros(3)}, folder / file)
    valid = {"metadata": {"total_size": 24}, "weight_map": names}
    _write(folder / "model.safetensors.index.json", data.draw(of_json(valid)))
    with bounded(folder):
        _refused(lambda: Folder(folder), ConfigError, folder)


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 100, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": False, "eos_token_id": [1, 2],
}  # fmt: skip


@fuzzed
@given(text=of_json(CONFIG))
def test_settings_of_others(scratch: Path, text: str) -> None:
    file = _write(scratch / "settings" / "config.json", text)
    _write(scratch / "settings" / "generation_config.json", text)
    with bounded(scratch):
        _refused(lambda: read_config(read_settings(file.parent), str(file)), ConfigError, file)
        _refused(lambda: stop_tokens(file.parent), ConfigError, file.with_name("generation_config.json"))


@fuzzed
@given(data=st.data())
def test_tokenizers(scratch: Path, data: st.DataObject) -> None:
    valid = json.loads(train_bpe(["some words of a text, " * 20], 260).to_str())
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 10**30,
        "clean_up_tokenization_spaces": False, "extra_special_tokens": ["<a>"], "chat_template": "{{ messages }}",
    }  # fmt: skip
    broken = data.draw(st.sampled_from(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"]))
    folder = scratch / "tokenizer"
    for name, value in (("tokenizer.json", valid), ("tokenizer_config.json", said)):
        _write(folder / name, data.draw(of_json(value)) if name == broken else json.dumps(value))
    with bounded(scratch):
        _refused(lambda: _used(tokenizer_of(folder)), ConfigError, folder)


def test_an_id_far_beyond_the_others_is_refused_at_once(scratch: Path) -> None:
    """Found by `test_tokenizers`: it took 53 s and 8 GB."""
    valid = json.loads(train_bpe(["some words of a text, " * 20], 260).to_str())
    valid["model"]["vocab"]["a"] = 2**31
    file = _write(scratch / "far" / "tokenizer.json", json.dumps(valid))
    with bounded(scratch):
        assert _refused(lambda: _used(tokenizer_of(file.parent)), ConfigError, file.parent)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_two_gigabytes_is_refused_unread(scratch: Path, name: str) -> None:
    """It took 8 s and 4 GB."""
    folder = scratch / f"sparse-{name}"
    file = _write(folder / "tokenizer.json", train_bpe(["some words of a text, " * 20], 260).to_str())
    with file.with_name(name).open("ab") as opened:
        opened.truncate(2**31)
    with bounded(scratch):
        assert _refused(lambda: _used(tokenizer_of(folder)), ConfigError, folder)


def _used(tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is not None:
        rule = TokenizerConfig(parse_special_tokens=True).special_tokens(tokenizer)
        tokenizer.decode(encoded(tokenizer, "some words of 1 é", rule))


@fuzzed
@given(data=st.data())
def test_gguf(scratch: Path, data: st.DataObject) -> None:
    valid = scratch / "valid.gguf"
    if not valid.exists():
        _write_gguf(valid)
    file = _write(scratch / "fuzzed.gguf", data.draw(of_bytes(valid.read_bytes())))
    with bounded(scratch):
        _refused(lambda: GGUFFile(file), ConfigError, file)


def _write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    sizes = {"token_embd": (16, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_up": (64, 32)}
    for name, shape in sizes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@fuzzed
@given(data=st.data())
def test_mds_shards(scratch: Path, data: st.DataObject) -> None:
    folder = scratch / "mds"
    if not folder.exists():
        with MDSWriter(folder, {"text": "str", "n": "int", "x": "ndarray:int32"}) as writer:
            for number in range(3):
                writer.write({"text": "some words", "n": number, "x": np.arange(number + 1, dtype=np.int32)})
        (folder.parent / "mds-valid").mkdir()
        for file in folder.iterdir():
            (folder.parent / "mds-valid" / file.name).write_bytes(file.read_bytes())
    broken = data.draw(st.sampled_from(["index.json", "shard.00000.mds"]))
    for file in (scratch / "mds-valid").iterdir():
        content = file.read_bytes()
        if file.name == broken:
            text = of_json(json.loads(content)) if broken == "index.json" else of_bytes(content)
            content = data.draw(text)  # type: ignore[assignment]
        _write(folder / file.name, content)

    def read() -> None:
        found = MDSFolder(folder, scratch / "cache")
        for number in range(min(len(found), 3)):
            found.sample(number)

    with bounded(folder):
        _refused(read, ConfigError, folder)


@fuzzed
@given(data=st.data())
def test_token_shards(run: Path, data: st.DataObject) -> None:
    valid = next((run.parent / "cache" / "tokens").glob("*/index.json"))
    folder = run.parent / "tokens"
    broken = data.draw(st.sampled_from(["index.json", "tokens-00000.bin"]))
    for name in ("index.json", "tokens-00000.bin"):
        content = valid.with_name(name).read_bytes()
        _write(folder / name, data.draw(of_bytes(content)) if name == broken else content)
    with bounded(folder):
        _refused(lambda: TokenStream(folder), ConfigError, folder)


@fuzzed
@given(data=st.data())
def test_parquet(scratch: Path, data: st.DataObject) -> None:
    valid = scratch / "valid.parquet"
    if not valid.exists():
        pyarrow.parquet.write_table(pyarrow.table({"text": ["some words"] * 20, "n": list(range(20))}), valid)
    content = valid.read_bytes()
    # The footer, which is the header of these files, is at the end.
    file = _write(scratch / "fuzzed.parquet", data.draw(of_bytes(content[::-1], 1000))[::-1])

    def read() -> None:
        check_parquet(file)
        for _ in read_table(file, "text"):
            pass

    with bounded(scratch):
        _refused(read, ConfigError, file)


def test_a_parquet_file_of_a_type_that_is_not_supported_is_refused(scratch: Path) -> None:
    """Found by `test_parquet`: to pyarrow, an integer of 4 bits is no ValueError, but a NotImplementedError."""
    file = scratch / "narrow.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some words"], "n": pyarrow.array([1])}), file)
    content = file.read_bytes()
    (schema,) = re.findall(rb"(////(?:[A-Za-z0-9+/=]{4})+)", content)
    bits = base64.b64decode(schema).replace(struct.pack("<i", 64), struct.pack("<i", 4))
    _write(file, content.replace(schema, base64.b64encode(bits)))
    with bounded(scratch):
        assert _refused(lambda: check_parquet(file), ConfigError, file)
        assert _refused(lambda: list(read_table(file, "text")), ConfigError, file)
