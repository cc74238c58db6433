"""Many prompts at once: each row as if it were alone, from files and into files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmfoundry.cli.inference import generate_main
from llmfoundry.cli.opening import open_hugging_face
from llmfoundry.config import ConfigError, check
from llmfoundry.data.chat_template import CHATML
from llmfoundry.data.tokenizer import SpecialTokens
from llmfoundry.eval.chat import Chat, Template
from llmfoundry.eval.generate import Sampling, generate
from llmfoundry.eval.generate_many import generate_many, request_of
from llmfoundry.eval.likelihood import Prompt, Ranks, continue_all
from llmfoundry.model.transformer import CausalLMConfig
from tests.data.chat_tokenizer import tokenizer, turns
from tests.hf.theirs import CASES, MOE, Case

PLAIN = SpecialTokens(parse=True)
PROMPTS = ["What is 2 + 2?", "yes", "", "a b c d e f g h i j k l m n", "Grüße, 你好", "yes yes"]
# A mixture, windows, ALiBi, latents, sinks with windows, learned positions.
KINDS = {
    "mixtral": "window, all heads", "mistral": "window", "mpt": "tied", "deepseek_v3": "as published",
    "gpt_oss": "window first", "gpt2": "tied", "qwen3_moe": "normalised, tied",
}  # fmt: skip


def saved(case: Case, folder: Path, template: str | None = CHATML) -> Path:
    """A model with a tokenizer, as `transformers` saves them."""
    own = tokenizer(template)
    settings = case.settings | {"vocab_size": len(own), "eos_token_id": own.eos_token_id}
    case._replace(settings=settings).build().save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = MOE | {"num_local_experts": 4, "max_position_embeddings": 512}
    return saved(Case("mixtral", "", settings), tmp_path_factory.mktemp("mixtral"))


AS_IT_IS = Case("gpt_neox", "", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                                 "num_attention_heads": 4, "max_position_embeddings": 64})  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, AS_IT_IS.model_type])
def test_each_row_is_what_it_is_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmfoundry.eval.generate_many.BATCHES", 1)  # the last two have a part of their own
    (case,) = (case for case in [*CASES, AS_IT_IS] if (case.model_type, case.about) == (kind, KINDS.get(kind, "")))
    ready = open_hugging_face(str(saved(case, tmp_path)), "fp32")
    for how in (Sampling(20, temperature=0), Sampling(20, temperature=1.2, top_p=0.9, seed=3)):
        requests = [request_of(prompt, ready.tokenizer, PLAIN, None) for prompt in PROMPTS]
        many = list(generate_many(ready.model, ready.tokenizer, requests, how, Ranks(4), set()))
        for number, (prompt, request, one) in enumerate(zip(PROMPTS, requests, many, strict=True)):
            alone = generate(ready.model, ready.tokenizer, prompt, **how._asdict(), number=number, special=PLAIN)
            assert request.shown + one.text == alone
        assert len({one.text for one in many}) > 3 and max(one.tokens for one in many) == 20


def test_conversations_get_the_answers_of_a_chat(mixtral: Path) -> None:
    ready = open_hugging_face(str(mixtral), "fp32")
    how = Sampling(16, temperature=0)
    said = turns("!Be brief.", "hello"), turns("yes"), turns("count", "1 2 3", "and on")
    plain = Chat(ready.model, Template(ready.tokenizer))
    first = plain.answer(said[0], how).text
    pairs = (first[i : i + 2] for i in range(4, len(first)))
    letters = next(pair for pair in pairs if "\ufffd" not in pair)  # a template's are whole characters
    for template in (CHATML, CHATML.replace("<|im_end|>", letters)):  # ends by a token, or by letters
        chat = Chat(ready.model, Template(ready.tokenizer, template))
        requests = [request_of(messages, ready.tokenizer, PLAIN, template) for messages in said]
        many = list(generate_many(ready.model, ready.tokenizer, requests, how, Ranks(8), set()))
        for messages, one in zip(said, many, strict=True):
            answer = chat.answer(messages, how)
            assert (one.text, one.finish) == (answer.text, answer.finish)


def test_files_in_and_out(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    texts, mixed, out = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "out.jsonl"
    texts.write_text("yes\n\nWhat is 2 + 2?\r\n")
    caplog.set_level("INFO")
    rows = [{"id": 7, "prompt": "yes"}, {"messages": turns("yes")}, {"prompt": "What is 2 + 2?"}]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--checkpoint", str(mixtral), "--temperature", "0", "--max-new-tokens", "8", "precision=fp32"]
    assert generate_main([*common, "--prompts", str(texts)]) == 0
    assert f"{texts}: 1 empty line is left out" in caplog.text
    first, second = capsys.readouterr().out.removesuffix("\n").split("\n\n")
    assert generate_main([*common, "--prompts", str(mixed), "--output", str(out)]) == 0
    assert capsys.readouterr().out == f"3 completions written to {out}\n"
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in row if key in given} for row, given in zip(found, rows, strict=True)] == rows
    assert "yes" + found[0]["completion"] == first and "What is 2 + 2?" + found[2]["completion"] == second
    assert all(row["tokens"] == 8 and row["finish_reason"] == "length" for row in found)
    assert generate_main([*common, "--prompt", "yes", "--prompt", "What is 2 + 2?"]) == 0
    assert capsys.readouterr().out == f"{first}\n\n{second}\n"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "yes", "must be a .txt with a prompt per line, or a .jsonl"),
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.jsonl", "{}", "line 1: must be a mapping with either `prompt` or `messages`"),
        ("a.jsonl", '{"prompt": "a"}\n[]', "line 2: must be a mapping with either"),
        ("a.jsonl", '{"prompt": 1}', "line 1: prompt must be a text"),
        ("a.jsonl", '{"messages": "hi"}', "line 1: messages must be a list of mappings"),
        ("a.jsonl", "yes", "line 1: is not valid JSON"),
        (None, "", "cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    name: str | None, text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / (name or "none.txt")
    if name is not None:
        file.write_text(text)
    assert generate_main(["--checkpoint", "nowhere", "--prompts", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --prompts: {file}") and says in line


def test_a_place_that_cannot_be_written_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none" / "out.jsonl"):
        assert generate_main(["--checkpoint", "nowhere", "--prompt", "a", "--output", str(path)]) == 2
        assert f"--output: {path} cannot be written" in capsys.readouterr().err


def test_a_prompt_longer_than_the_learned_positions_is_named(tmp_path: Path) -> None:
    (case,) = (case for case in CASES if (case.model_type, case.about) == ("gpt2", "tied"))
    ready = open_hugging_face(str(saved(case, tmp_path)), "fp32")
    requests = [request_of(prompt, ready.tokenizer, PLAIN, None) for prompt in ("yes", "yes " * 50)]
    with pytest.raises(ConfigError, match=r"prompt 1 of \d+ tokens and 20 new ones need \d+ positions, .* learned 64"):
        next(generate_many(ready.model, ready.tokenizer, requests, Sampling(20), Ranks(4), set()))


def test_where_experts_drop_tokens_no_row_is_at_the_cost_of_another() -> None:
    block = {"ffn_type": "mb_moe", "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2,
             "moe_capacity_factor": 1.0}  # fmt: skip
    model = check(CausalLMConfig, {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "max_seq_len": 64,
                                   "ffn_config": block}).build().eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    prompts = [Prompt(torch.randint(0, 97, (n,)).tolist(), 12) for n in (3, 9, 5, 14)]
    together = continue_all(model, prompts, Ranks(4), stop=())
    assert together == [text for prompt in prompts for text in continue_all(model, [prompt], Ranks(4), stop=()) or []]
