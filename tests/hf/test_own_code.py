"""Models of no family leave with a modelling file, which `transformers` runs where this package is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmfoundry.config import ConfigError, check
from llmfoundry.hf import export_note, from_pretrained, save_pretrained
from llmfoundry.hf.facts import facts
from llmfoundry.hf.family import write_config
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

Settings = dict[str, object]
VOCAB, LENGTH, NEW = 97, 19, 12
TOKENS = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
SIZES: Settings = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 64}
GQA: Settings = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
YARN: Settings = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3: Settings = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16}  # fmt: skip
MIXTURE: Settings = {"ffn_type": "moe", "moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 24}
SIGMOID: Settings = {"moe_score_fn": "sigmoid", "moe_normalize_expert_weights": 1.0, "moe_routed_scaling": 2.5}

CASES: dict[str, Settings] = {
    "MPT with grouped heads and learned positions": {"attn_config": GQA},
    "MPT with one key head and rope": {
        "attn_config": {"attn_type": "multiquery_attention", "rope": True, "clip_qkv": 0.8, "softmax_scale": 0.2},
    },
    "gated MPT with alibi, untied": {
        "attn_config": {"alibi": True, "qk_ln": True}, "ffn_config": {"ffn_type": "mptglu"}, "no_bias": True,
        "tie_word_embeddings": False,
    },
    "six heads of alibi, window, clip after the norms": {
        "d_model": 48, "n_heads": 6, "norm_type": "rmsnorm",
        "attn_config": {"alibi": True, "sliding_window_size": 4, "qk_norm": True, "clip_qkv": 0.9,
                        "clip_qkv_after_norm": True},
    },
    "MegaBlocks' mixture: one output bias": {"ffn_config": MIXTURE | {"ffn_type": "mb_dmoe"}},
    "biases of experts, shared expert with a gate, dense first": {
        "n_layers": 3, "attn_config": GQA | {"rope": True, "rope_scaling": LLAMA3},
        "ffn_config": MIXTURE | {"shared_expert": True, "shared_expert_gate": True, "shared_expert_hidden_size": 20,
                                 "first_k_dense": 1, "dense_ffn_hidden_size": 40},
    },
    "groups, sigmoid, moved bias, windows in turn, yarn, soft caps": {
        "norm_type": "rmsnorm", "no_bias": True, "final_logit_softcapping": 20.0, "attn_window_pattern": [4, -1],
        "attn_config": GQA | {"head_dim": 12, "rope": True, "rope_scaling": YARN, "attn_logit_softcapping": 15.0},
        "ffn_config": MIXTURE | SIGMOID | {"moe_num_experts": 8, "moe_n_groups": 4, "moe_topk_groups": 2,
                                           "moe_bias_update_rate": 0.0, "moe_router_bias": True},
    },
    "sinks, gpt-oss' unit, linear rope": {
        "attn_config": {"sinks": True, "rope": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "ffn_config": MIXTURE | {"ffn_act_fn": {"name": "swiglu_oss"}, "ffn_act_limit": 1.0},
    },
}  # fmt: skip
each_case = pytest.mark.parametrize("about", CASES)


def model_of(about: str) -> CausalLM:
    """A model of a case, with weights of a size that makes every part matter."""
    torch.manual_seed(3)
    model = check(CausalLMConfig, SIZES | CASES[about]).build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + centre)
        for buffer in model.buffers():
            buffer.copy_(torch.randn(buffer.shape) * 0.2)
    return model


def logits_of(model: CausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits is not None
    return logits


def greedy(model: CausalLM, tokens: Tensor) -> list[list[int]]:
    """The next tokens, without a cache."""
    for _ in range(NEW):
        tokens = torch.cat((tokens, logits_of(model, tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens.tolist()  # type: ignore[no-any-return]


# Runs alone: this package cannot be imported there.
THEIRS = """
import json, sys
sys.modules["llmfoundry"] = None
import torch, transformers
from transformers import AutoModelForCausalLM
found, new = {}, NEW
for folder, tokens in json.load(open(sys.argv[1])).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.tensor(tokens)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    settings = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        said = model(tokens, labels=tokens)
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True).eval()
    found[folder] = {
        "logits": said.logits.tolist(),
        "loss": said.loss.item(),
        "text": model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings).tolist(),
        "padded": model.generate(padded, attention_mask=mask, **settings)[:, 3:].tolist(),
        "again": again(tokens).logits.tolist(),
        "module": type(model).__module__,
        "version": transformers.__version__,
    }
json.dump(found, open(sys.argv[2], "w"))
""".replace("NEW", str(NEW))  # fmt: skip


def run_theirs(folders: dict[Path, Tensor], work: Path, packages: str | None) -> dict[str, Settings]:
    """What `transformers` makes of folders, alone in a process; `packages`: a folder with another version of it."""
    (work / "in.json").write_text(json.dumps({str(folder): tokens.tolist() for folder, tokens in folders.items()}))
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    kept |= {"PYTHONPATH": packages} if packages else {}
    offline = {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, str(work / "in.json"), str(work / "out.json")],
        cwd=work, env=kept | offline, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Settings] = json.loads((work / "out.json").read_text())
    return found


@pytest.mark.parametrize("version", ["5", "4"])
def test_transformers_alone_computes_and_generates_the_same(version: str, tmp_path: Path) -> None:
    packages = os.environ.get("TRANSFORMERS4")
    if version == "4" and not packages:
        pytest.skip("TRANSFORMERS4 names no folder with transformers 4.57")
    models = {tmp_path / str(n): model_of(about) for n, about in enumerate(CASES)}
    for folder, model in models.items():
        save_pretrained(model, None, folder)
    found = run_theirs(dict.fromkeys(models, TOKENS), tmp_path, packages if version == "4" else None)
    for (folder, model), about in zip(models.items(), CASES, strict=True):
        theirs, true = found[str(folder)], logits_of(model, TOKENS)
        assert str(theirs["version"]).startswith(version) and "transformers_modules" in str(theirs["module"]), about
        assert true.std() > 0.1, about
        torch.testing.assert_close(torch.tensor(theirs["logits"]), true, rtol=0.0, atol=1e-5, msg=about)
        loss = torch.nn.functional.cross_entropy(true[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        assert theirs["loss"] == pytest.approx(loss.item(), abs=1e-5), about
        assert theirs["text"] == theirs["padded"] == greedy(model, TOKENS), about
        torch.testing.assert_close(torch.tensor(theirs["again"]), true, rtol=0.0, atol=1e-5, msg=about)
        again = from_pretrained(f"{folder}-again").model  # what `transformers` saves is read back too
        assert torch.equal(logits_of(again, TOKENS), true), about


@each_case
def test_there_and_back_is_the_same_to_the_bit(about: str, tmp_path: Path) -> None:
    model = model_of(about)
    save_pretrained(model, None, tmp_path / "out")
    again = from_pretrained(tmp_path / "out").model
    assert facts(again.config) == facts(model.config)
    ours = model.state_dict()
    assert again.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in again.state_dict().items())
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == ours.keys()
    assert (tmp_path / "out" / "modeling_llmfoundry.py").is_file()


@each_case
def test_the_note_says_so(about: str) -> None:
    config = check(CausalLMConfig, SIZES | CASES[about])
    assert (
        export_note(config) == "Hugging Face export: with modelling code of its own, loaded with trust_remote_code=True"
    )


def test_it_is_the_last_resort() -> None:
    alibi = check(CausalLMConfig, SIZES | {"no_bias": True, "attn_config": {"alibi": True}})
    assert write_config(alibi)[0].model_type == "mpt"
    assert export_note(alibi) == "Hugging Face export: as MPT"
    assert write_config(alibi, "llmfoundry")[0].code


LACKING: dict[str, Settings] = {
    "attn_config.attn_type='multihead_latent_attention'": {
        "attn_config": {"attn_type": "multihead_latent_attention", "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                        "qk_rope_head_dim": 8, "v_head_dim": 8, "rope": True},
    },
    "ffn_config.moe_capacity_factor=1.5": {"ffn_config": MIXTURE | {"moe_capacity_factor": 1.5}},
    "ffn_config.uniform_expert_assignment=True": {"ffn_config": MIXTURE | {"uniform_expert_assignment": True}},
}  # fmt: skip


@pytest.mark.parametrize("says", LACKING)
def test_what_the_file_does_not_compute_is_not_written(says: str) -> None:
    with pytest.raises(ConfigError) as error:
        write_config(check(CausalLMConfig, SIZES | LACKING[says]), "llmfoundry")
    assert says in str(error.value)


def test_a_setting_that_is_no_word_of_ours_is_refused(tmp_path: Path) -> None:
    save_pretrained(model_of("MPT with grouped heads and learned positions"), None, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_modle": 3}))
    with pytest.raises(ConfigError, match="d_modle: unknown key"):
        from_pretrained(tmp_path / "out")
