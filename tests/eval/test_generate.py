"""Text from a model: with a cache as without one, the same for a seed, within top-p."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmfoundry.cli.inference import generate_main
from llmfoundry.config import ConfigError, check
from llmfoundry.data.tokenizer import PLAIN_TEXT
from llmfoundry.eval.generate import Sampling, generate, sample
from llmfoundry.eval.generate_many import generate_many, request_of
from llmfoundry.eval.likelihood import Ranks
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

WORDS = ["<end>", *(f"w{i}" for i in range(30))]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")


@pytest.fixture
def model() -> CausalLM:
    attention = GroupedQueryConfig(attn_type="grouped_query_attention", kv_n_heads=2, rope=True)
    config = CausalLMConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=len(WORDS), attn_config=attention)
    model = CausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_greedy_text_is_that_of_whole_forwards(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    text = generate(model, tokenizer, "w3 w5", max_new_tokens=20, temperature=0)
    ids = tokenizer.encode("w3 w5")
    while len(ids) < 22:
        logits = model(torch.tensor([ids])).logits
        assert logits is not None
        best = int(logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    assert text == tokenizer.decode(ids)


def test_a_seed_names_a_text(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def write(seed: int) -> str:
        return generate(model, tokenizer, "w3", max_new_tokens=20, seed=seed)

    assert write(1) == write(1)
    assert len({write(seed) for seed in range(5)}) > 1


def test_an_empty_prompt_begins_a_document(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert generate(model, tokenizer, "", max_new_tokens=5, temperature=0)


def test_text_ends_with_the_learned_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    config = CausalLMConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=len(WORDS), max_seq_len=8)
    model = CausalLM(config)
    generate(model, tokenizer, "w3 w5", max_new_tokens=7)
    with pytest.raises(ConfigError, match=r"2 tokens and 8 new ones need 9 positions, and the model has learned 8"):
        generate(model, tokenizer, "w3 w5", max_new_tokens=8)


def test_a_prompt_with_half_a_character_is_refused(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"the text 'w3 .ud800' has a lone surrogate, '.ud800'"):
        generate(model, tokenizer, "w3 \ud800", max_new_tokens=1)


def test_a_prompt_longer_than_the_rows_of_training_is_said(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    config = check(CausalLMConfig, {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": len(WORDS),
                                    "max_seq_len": 8, "attn_config": {"rope": True}})  # fmt: skip
    model = CausalLM(config).eval()
    generate(model, tokenizer, "w3 w5", max_new_tokens=9)
    assert not caplog.text
    generate(model, tokenizer, "w3 " * 9, max_new_tokens=1)
    assert "the prompt has 9 tokens, and the model was made for 8 (max_seq_len)" in caplog.text
    caplog.clear()
    requests = [request_of("w3 " * n, tokenizer, PLAIN_TEXT, None) for n in (2, 9, 3)]
    assert len(list(generate_many(model, tokenizer, requests, Sampling(1), Ranks(2), set()))) == 3
    assert "prompt 1, the longest, has 9 tokens" in caplog.text


@pytest.mark.parametrize("options", [["--temperature", "nan"], ["--temperature", "inf"], ["--top-p", "nan"]])
def test_options_that_are_no_numbers_are_refused(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        generate_main(["--checkpoint", "nowhere", *options])
    assert ended.value.code == 2
    assert f"argument {options[0]}: must be a number" in capsys.readouterr().err


def test_the_model_goes_on_training(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generate(model.train(), tokenizer, "w3", max_new_tokens=1)
    assert model.training


def test_top_p_leaves_the_unlikely_out() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    dice = torch.Generator().manual_seed(0)
    drawn = [sample(logits, 1.0, 0.7, dice) for _ in range(200)]
    assert set(drawn) == {0, 1}
    assert 0.5 < drawn.count(0) / 200 < 0.75, "5 to 3"
    assert set(sample(logits, 1.0, 1e-6, dice) for _ in range(20)) == {0}


def test_top_k_leaves_all_but_k_out_before_top_p() -> None:
    logits = torch.tensor([0.05, 0.5, 0.3, 0.15]).log()
    dice = torch.Generator().manual_seed(0)
    assert set(sample(logits, 1.0, 1.0, dice, top_k=3) for _ in range(100)) == {1, 2, 3}
    # Of the two that are left, the first has 5/8 and not 1/2.
    assert set(sample(logits, 1.0, 0.6, dice, top_k=2) for _ in range(100)) == {1}
    assert set(sample(logits, 1.0, 0.6, dice) for _ in range(100)) == {1, 2}


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    assert sample(torch.tensor([9.0, 10.0, 2.0]), 1e-300, 1.0, torch.Generator()) == 1


def test_temperature_zero_takes_the_lowest_id_of_equals() -> None:
    assert sample(torch.tensor([0.0, 2.0, 2.0]), 0, 1.0, torch.Generator()) == 1
