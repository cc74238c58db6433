"""A model of `hf_causal_lm` drops in training what the module of `transformers` does: one seed, the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmfoundry.config import check
from llmfoundry.hf.pretrained import load_weights
from llmfoundry.integrations import hf_causal_lm
from llmfoundry.integrations.foundry_yaml import translate
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

VOCAB = 101
MODELS: dict[str, dict[str, object]] = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0.1, "embd_pdrop": 0.2,
             "attn_pdrop": 0.3},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, "window_size": 8,
                "attention_types": [[["global", "local"], 1]], "resid_dropout": 0.1, "embed_dropout": 0.2,
                "attention_dropout": 0.3},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "dropout": 0.1, "attention_dropout": 0.3},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.3},
}  # fmt: skip
OURS = {"gpt2": (0.1, 0.2, 0.3), "gpt_neo": (0.1, 0.2, 0.3), "opt": (0.1, 0.0, 0.3),
        "llama": (0.0, 0.0, 0.3)}  # fmt: skip


def _translated(folder: Path, **keys: object) -> tuple[CausalLMConfig, list[str]]:
    data = {
        "model": {"name": "hf_causal_lm", "pretrained_model_name_or_path": str(folder)} | keys,
        "save_folder": "runs",
    }
    data, notes = translate(data)
    config = check(ModelConfig, data["model"])
    assert isinstance(config, CausalLMConfig)
    return config, notes


@pytest.mark.parametrize("kind", MODELS)
def test_training_drops_what_transformers_does(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **MODELS[kind], vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    theirs = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").train()
    theirs.save_pretrained(tmp_path)
    config, notes = _translated(tmp_path)
    assert (config.resid_pdrop, config.emb_pdrop, config.attn_config.dropout) == OURS[kind]
    said = [note for note in notes if "is now model." in note and "pdrop" in note]
    assert len(said) == sum(isinstance(value, float) for value in MODELS[kind].values())
    ours: CausalLM = config.build()
    load_weights(ours, tmp_path)
    tokens = torch.randint(0, VOCAB, (2, 20))
    found = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        found.append(model(tokens).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    assert (ours(tokens).logits - found[0]).abs().max() > 0.01


def test_dropout_may_be_set_over_the_checkpoints(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2", **MODELS["gpt2"], vocab_size=VOCAB).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    config, notes = _translated(tmp_path, pretrained=False, config_overrides={"resid_pdrop": 0.0, "attn_pdrop": 0.5})
    assert (config.resid_pdrop, config.emb_pdrop, config.attn_config.dropout) == (0.0, 0.2, 0.5)
    assert not any("resid_pdrop" in note for note in notes)


def test_one_number_of_mpt_is_for_weights_and_outputs() -> None:
    """`transformers` 5 refuses to read any but whole numbers there, so this one has no module beside it."""
    model = {"resid_pdrop": 0.0, "emb_pdrop": 0.0, "attn_config": {"attn_pdrop": 0.0}}
    (note,) = hf_causal_lm._add_dropout(model, "a", {"model_type": "mpt", "attn_config": {"attn_pdrop": 0.3}})
    assert model == {"resid_pdrop": 0.3, "emb_pdrop": 0.0, "attn_config": {"attn_pdrop": 0.3}}
    assert note.endswith("is now model.attn_config.attn_pdrop, model.resid_pdrop")
