"""GGUF files, written here as llama.cpp's converter writes them, against the models that they were made from."""

from __future__ import annotations

import struct
import sys
import weakref
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from theirs import LINEAR, LLAMA3, LLAMA_LIKE, VOCAB, YARN, Case
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llmfoundry.cli.convert import convert_main
from llmfoundry.config import ConfigError
from llmfoundry.hf import from_pretrained
from llmfoundry.hf.facts import facts
from llmfoundry.hf.family import read_config
from llmfoundry.hf.gguf import GGUFFile, tokenizer_of
from llmfoundry.hf.pieces import fill
from llmfoundry.hf.pretrained import matched
from llmfoundry.model.transformer import CausalLM

gguf = pytest.importorskip("gguf")

TOKENS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
SIZES = LLAMA_LIKE | {"intermediate_size": 64}  # quantised rows come in blocks of 32
WIDE_LLAMA3 = LLAMA3 | {"rope_theta": 10000.0, "high_freq_factor": 6.0, "original_max_position_embeddings": 256}
CASES = [
    Case("llama", "grouped", SIZES),
    Case("llama", "all heads, tied", SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    Case("llama", "wide heads, eps, theta", SIZES | {
        "head_dim": 12, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }),
    Case("llama", "biases, linear", SIZES | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}),
    Case("llama", "yarn", SIZES | {"rope_parameters": YARN}),
    Case("llama", "llama3", SIZES | {"head_dim": 16, "rope_parameters": WIDE_LLAMA3}),
    Case("mistral", "no window", SIZES | {"sliding_window": None}),
    Case("mistral", "window", SIZES | {"sliding_window": 5}),
    Case("qwen2", "grouped, tied", SIZES | {"tie_word_embeddings": True}),
    Case("qwen2", "all heads", SIZES | {"num_key_value_heads": 4}),
    Case("qwen2", "yarn", SIZES | {"rope_parameters": YARN}),
    Case("qwen3", "grouped", SIZES | {"head_dim": 8}),
    Case("qwen3", "tied, wide heads", SIZES | {"head_dim": 16, "tie_word_embeddings": True}),
    Case("qwen3", "one key head", SIZES | {"head_dim": 8, "num_key_value_heads": 1}),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model_type}: {case.about}")


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows as `llama` files have them: the two halves of a head interleaved."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def divisors(rope: dict[str, float], head_dim: int) -> Tensor:
    """Of Llama 3.1's scaling, in the converter's words."""
    low, high, length = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * torch.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = min(max((length / wavelength - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(found)


def write(model: PreTrainedModel, path: Path, kind: str = "F32", **more: object) -> Path:
    """A GGUF file of a model; vectors stay in float32. `more`: settings in place of what the model says."""
    config, state = model.config, model.state_dict()
    arch = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, arch)
    rope, head_dim = config.rope_parameters, getattr(config, "head_dim", None)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_name("a tiny mistral" if config.model_type == "mistral" else "a tiny model")
    if arch == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(rope, head_dim).numpy())
    if config.model_type == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    for key, value in more.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, value in state.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            value = turned(value, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        as_kind = gguf.GGMLQuantizationType[kind if value.dim() > 1 else "F32"]
        data = gguf.quants.quantize(value.float().contiguous().numpy(), as_kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path) -> CausalLM:
    """The model in a file, by the rules of its family."""
    file = GGUFFile(path)
    family, config = read_config(file.config, str(path))
    checkpoint = matched(path, family, config, file)
    model = config.build().eval()
    for name, tensor in model.state_dict().items():
        fill(tensor, (0,) * tensor.dim(), checkpoint.copies[name], checkpoint.source)
    return model


def check_logits(ours: CausalLM, theirs: PreTrainedModel, tolerance: float = 1e-4) -> None:
    """In float64: what is compared is how tensors are read, not the order of sums, which differs between machines."""
    with torch.no_grad():
        found, true = deepcopy(ours).double()(TOKENS).logits, deepcopy(theirs).double()(TOKENS).logits
    assert found is not None and true.abs().max() > 0.1
    assert (found - true).abs().max() <= tolerance


@each_case
def test_logits_are_those_of_the_model_that_was_written(case: Case, tmp_path: Path) -> None:
    theirs = case.build()
    ours = load(write(theirs, tmp_path / "model.gguf"))
    check_logits(ours, theirs)
    # The very words of its config.json: 1e-5 and not the nearest float32.
    _, true = read_config(theirs.config.to_dict() | ({"model_type": "llama"} if case.about == "no window" else {}))
    said = facts(true)
    if case.about == "llama3":  # ratios alone matter, and low_freq_factor is 1 here
        assert said["attn_config.rope_scaling"]["low_freq_factor"] == 1.0
    assert facts(ours.config) == said and ours.config.max_seq_len == true.max_seq_len


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("case", [CASES[0], CASES[9], CASES[11]], ids=lambda case: case.model_type)
def test_types_are_read_as_the_library_dequantises_them(case: Case, kind: str, tmp_path: Path) -> None:
    theirs = case.build()
    path = write(theirs, tmp_path / "model.gguf", kind)
    as_kind = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                data = gguf.quants.quantize(parameter.numpy(), as_kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(data, as_kind)))
    check_logits(load(path), theirs, 1e-6)
    kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert GGUFFile(path).specs["model.layers.0.mlp.up_proj.weight"].dtype == kept


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[8], CASES[9]], ids=lambda c: f"{c.model_type}: {c.about}")
def test_the_reader_of_transformers_agrees(case: Case, kind: str, tmp_path: Path) -> None:
    # Theirs takes the vocabulary's size from the tokenizer, which there is none here, or from this.
    size = {"qwen2__vocab_size": VOCAB} if case.model_type == "qwen2" else {}
    path = write(case.build(), tmp_path / "model.gguf", kind, **size)
    check_logits(load(path), AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval())


def test_settings_of_llama_3_1_at_full_size_are_found_again(tmp_path: Path) -> None:
    for head_dim, factor in ((128, 8.0), (64, 32.0)):  # of 8B, of Llama-3.2-1B
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
        case = Case("llama", "", SIZES | {"head_dim": head_dim, "num_hidden_layers": 1, "rope_parameters": rope})
        assert GGUFFile(write(case.build(), tmp_path / f"{head_dim}.gguf")).config["rope_parameters"] == rope


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    file = GGUFFile(write(CASES[0].build(), tmp_path / "model.gguf", "Q8_0"))
    one, two = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2))
    first = file.parts(one)[0].values
    assert file.parts(one)[0].values is first  # slab after slab, made once
    gone = weakref.ref(first)
    del first
    file.parts(two)
    assert gone() is None


def test_its_tokenizer_is_converted(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(letters)} | {"th": 256, "the": 257, "<end>": 258}
    true = Tokenizer(models.BPE(words, [("t", "h"), ("th", "e")]))
    true.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    true.decoder = decoders.ByteLevel()
    case = CASES[9]._replace(settings=CASES[9].settings | {"vocab_size": 259})

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            self.add_tokenizer_model("gpt2")
            self.add_tokenizer_pre("qwen2")
            self.add_token_list(list(words))
            self.add_token_types([gguf.TokenType.NORMAL] * 258 + [gguf.TokenType.CONTROL])
            self.add_token_merges(["t h", "th e"])
            self.add_eos_token_id(258)
            super().write_header_to_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        path = write(case.build(), tmp_path / "model.gguf")
    found = tokenizer_of(path)
    expected = PreTrainedTokenizerFast(tokenizer_object=true)
    for text in ("the thing", "  other\n", "naïve 12"):
        assert found.encode(text, add_special_tokens=False) == expected.encode(text, add_special_tokens=False)
        assert found.decode(found.encode(text, add_special_tokens=False)) == text
    assert GGUFFile(path).config["eos_token_id"] == 258


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert tokenizer_of(write(CASES[0].build(), tmp_path / "model.gguf")) is None


def test_a_tokenizer_of_an_unknown_kind_has_to_be_given(tmp_path: Path) -> None:
    path = write(CASES[0].build(), tmp_path / "model.gguf", tokenizer__ggml__model="unheard-of")
    with pytest.raises(ConfigError, match="model.gguf: its tokenizer: cannot be loaded: .* give the tokenizer itself"):
        tokenizer_of(path)


def test_it_stands_wherever_a_folder_does(tmp_path: Path) -> None:
    theirs = CASES[0].build()
    path = write(theirs, tmp_path / "model.gguf")
    check_logits(from_pretrained(path, torch.float32).model, theirs)
    assert convert_main(["from-hf", str(path), str(tmp_path / "ours")]) == 0
    assert convert_main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for one, two in zip(again.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two)


SETTINGS = {
    "llama.rope.dimension_count must be 8, found 4": {"llama__rope__dimension_count": 4},
    "llama.expert_count must be 0, found 8": {"llama__expert_count": 8},
    "llama.attention.scale=0.5 is not supported": {"llama__attention__scale": 0.5},
    "llama.rope.scaling.type must be none, linear or yarn, found 'longrope'": {
        "llama__rope__scaling__type": "longrope"
    },
    "llama.rope.scaling.attn_factor must be 1.0, found 1.5": {"llama__rope__scaling__attn_factor": 1.5},
    "llama.feed_forward_length must be a whole number, 1 or more, found 'wide'": {"llama__feed_forward_length": "wide"},
    "holds no model, but a adapter": {"general__type": "adapter"},
    "is one of 3 parts; merge them": {"split__count": 3},
    "llama.attention.head_count must be a whole number, 1 or more, found 0": {"llama__attention__head_count": 0},
    "llama.rope.freq_base must be a number, found 'long'": {"llama__rope__freq_base": "long"},
    "llama.block_count must be 2, found 3": {"llama__block_count": 3},
    "llama.embedding_length must be 32, found 64": {"llama__embedding_length": 64},
    "has shape [64, 32], but": {"llama__feed_forward_length": 96},
    "llama.vocab_size must be 97, found 98": {"llama__vocab_size": 98},
}


@pytest.mark.parametrize("says", SETTINGS)
def test_a_setting_that_is_not_supported_is_named(says: str, tmp_path: Path) -> None:
    path = write(CASES[0].build(), tmp_path / "model.gguf")
    with pytest.MonkeyPatch.context() as patch:
        known = {key.replace("__", ".") for key in SETTINGS[says]}
        plain = gguf.GGUFWriter.add_key_value

        def first(writer: object, key: str, value: object, *args: object, **kwargs: object) -> None:
            if key not in known or value == SETTINGS[says].get(key.replace(".", "__")):
                plain(writer, key, value, *args, **kwargs)

        patch.setattr(gguf.GGUFWriter, "add_key_value", first)
        path = write(CASES[0].build(), path, **SETTINGS[says])
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(path) in str(error.value) and says in str(error.value)


def test_another_architecture_is_named_with_those_supported(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="architecture 'mamba' is not supported; supported are llama, qwen2, qwen3"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 and more", "is not a GGUF file"),
        (b"GGUF", "is cut short or damaged"),
        (b"GGUF\x01\0\0\0" + bytes(16), "appears to be version 1"),
        (b"GGUF\0\0\0\x03" + bytes(16), "is big-endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "is cut short or damaged"),
    ],
)
def test_what_is_no_gguf_file_is_said(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        GGUFFile(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="no such file"):
        GGUFFile(tmp_path / "other.gguf")


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    content = write(CASES[0].build(), tmp_path / "model.gguf", "Q8_0").read_bytes()
    for size in [*range(4, 3000, 7), *range(3000, len(content), 5003), len(content) - 65]:
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(ConfigError, match="cut.gguf: is cut short or damaged"):
            GGUFFile(tmp_path / "cut.gguf")


def test_a_damaged_header_is_never_more_than_an_error(tmp_path: Path) -> None:
    content = bytearray(write(CASES[0].build(), tmp_path / "model.gguf", "Q8_0").read_bytes())
    refused = 0
    for place in range(4, 3000, 5):
        damaged = content.copy()
        damaged[place] ^= 0x81
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            file = GGUFFile(tmp_path / "damaged.gguf")
            family, config = read_config(file.config)
            matched(tmp_path, family, config, file)
        except ConfigError:
            refused += 1
    assert refused > 300


def test_a_file_asks_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(CASES[0].build(), tmp_path / "model.gguf")
    monkeypatch.delitem(sys.modules, "llmfoundry.hf.gguf_header", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="model.gguf: .* needs the `gguf` package, pip install gguf"):
        GGUFFile(path)


def header(*fields: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields)) + b"".join(fields)


def field(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def placed(name: bytes, *dims: int, kind: int = 0, start: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", kind, start)


LIST, NUMBER, TEXT = 9, 4, 8
HOSTILE = {
    "numbers past the end": header(field(b"a", LIST, struct.pack("<IQ", 4, 2**60))),
    "texts past the end": header(field(b"a", LIST, struct.pack("<IQ", TEXT, 2**60))),
    "a text as long as all memory": header(field(b"a", TEXT, struct.pack("<Q", 2**63))),
    "texts of such a length": header(field(b"a", LIST, struct.pack("<IQQ", TEXT, 2**40, 2**64 - 8))),
    "lists in lists": header(field(b"a", LIST, struct.pack("<IQ", LIST, 1) * 10_000)),
    "settings past the end": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "tensors past the end": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
    "one setting twice": header(field(b"a", NUMBER, bytes(4)), field(b"a", NUMBER, bytes(4))),
    "one tensor twice": header(tensors=2) + placed(b"a", 4) * 2 + bytes(99),
    "two tensors over the same bytes": header(tensors=2) + placed(b"a", 4) + placed(b"b", 4, start=8) + bytes(99),
    "a shape that wraps around": header(tensors=1) + placed(b"a", 2**32, 2**32) + bytes(99),
    "a place that wraps around": header(tensors=1) + placed(b"a", 1, start=2**64 - 32) + bytes(99),
    "too many dims": header(tensors=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**32 - 1) + bytes(99),
    "a type that there is not": header(tensors=1) + placed(b"a", 4, kind=999) + bytes(99),
    "an alignment of 0": header(field(b"general.alignment", NUMBER, bytes(4))),
    "a name that is no text": header(field(b"\xff", NUMBER, bytes(4))),
}  # fmt: skip


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_error_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ConfigError, match="model.gguf: is cut short or damaged: ") as error:
        GGUFFile(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="model.gguf: is cut short or damaged: "):
        tokenizer_of(path)
