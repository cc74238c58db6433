"""One rule for special tokens: what training reads, evaluation measures and generation continues are the same ids."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from llmfoundry.checkpoint.manifest import MANIFEST, measure, read_manifest, write_manifest
from llmfoundry.cli.convert import convert_main
from llmfoundry.cli.inference import eval_main, generate_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError
from llmfoundry.data.packing import pack
from llmfoundry.data.sources import Source
from llmfoundry.data.tokenizer import Encoder, SpecialTokens, TokenizerConfig, _bounded, train_bpe
from llmfoundry.eval.generate import encoded
from llmfoundry.hf.generation import stop_tokens
from llmfoundry.runtime import cache_root
from tests import forks

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
TEXT = " ".join(WORDS * 40)
CHAT = "<|im_start|>alpha<|im_end|>"


def tokenizer(bos: bool = True, extra: int = 0) -> Fast:
    """Byte-level BPE with <s>, </s> and two of ChatML; `bos`: it puts <s> before each text, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = Fast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False)
    fast.add_tokens([f"<extra{i}>" for i in range(extra)], special_tokens=True)
    return fast


def llama(folder: Path, bos: bool = True, extra: int = 0, stops: list[int] | None = None) -> Path:
    """A tiny Llama of random weights, its embedding without rows for `extra` tokens."""
    fast = tokenizer(bos, extra)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast) - extra, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    if stops is not None:
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": stops}))
    return folder


def theirs(folder: Path, prompt: str, n: int, **more: object) -> str:
    """The greedy text of `transformers`, with its defaults."""
    fast, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(**fast(prompt, return_tensors="pt"), max_new_tokens=n, do_sample=False, **more)
    return fast.decode(ids[0], skip_special_tokens=True)


def ours(capsys: pytest.CaptureFixture, checkpoint: Path, prompt: str, *options: str) -> str:
    capsys.readouterr()
    greedy = ["--temperature", "0", "--max-new-tokens", "12"]
    assert generate_main(["--checkpoint", str(checkpoint), "--prompt", prompt, *greedy, *options]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("prompt", ["alpha beta", CHAT, ""])
def test_a_converted_checkpoint_continues_a_prompt_as_transformers_does(
    tmp_path: Path, capsys: pytest.CaptureFixture, bos: bool, prompt: str
) -> None:
    folder = llama(tmp_path / "theirs", bos)
    assert convert_main(["from-hf", str(folder), str(tmp_path / "ours")]) == 0
    if prompt or bos:  # without a token there is nothing to continue in `transformers`
        assert ours(capsys, tmp_path / "ours", prompt) == theirs(folder, prompt, 12)
    else:
        assert ours(capsys, tmp_path / "ours", prompt)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("parse", [False, True])
def test_training_and_generation_give_a_text_the_same_ids(fast: bool, parse: bool) -> None:
    tokens, text = (tokenizer(), f"{CHAT} </s> x") if fast else (ByT5Tokenizer(), "one </s> two <pad>")
    rule = SpecialTokens(parse=parse)
    (trained,) = Encoder(tokens, rule).encode([text])
    assert encoded(tokens, text, rule) == trained
    assert (tokens.eos_token_id in trained) == parse
    bos = SpecialTokens(bos=0, parse=parse)
    assert encoded(tokenizer(), "alpha", bos)[0] == 0 and encoded(tokenizer(), "", bos) == [0]


def test_documents_open_with_bos_and_end_with_eos(tmp_path: Path) -> None:
    documents = ["alpha", "beta gamma", "delta"]
    source = Source("made-up", "f", lambda: iter(documents), 20, "", frozenset())
    fast = tokenizer()
    with_bos = pack(source, fast, cache_root(str(tmp_path)), SpecialTokens(bos=0))
    expected = [id for text in documents for id in [0, *Encoder(fast).encode([text])[0], 1]]
    assert with_bos.read(0, with_bos.n_tokens).tolist() == expected and with_bos.opening_token_id == 0
    without = pack(source, fast, cache_root(str(tmp_path)))
    assert without.read(0, without.n_tokens).tolist() == [1, *(id for id in expected if id != 0)]
    assert without.fingerprint != with_bos.fingerprint and without.opening_token_id == 1


def recipe(tmp_path: Path, checkpoint: Path, **more: object) -> Path:
    (tmp_path / "texts").mkdir(exist_ok=True)
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(WORDS[(i + j) % 10] for j in range(60)))
    data = yaml.safe_load((checkpoint / "config.yaml").read_text())
    data |= {"max_seq_len": 16, "global_train_batch_size": 2, "max_duration": "2ba", "eval_interval": "0ba"}
    data |= {"save_folder": str(tmp_path / "run"), "log_to_console": False, "load_path": str(checkpoint)}
    dataset = {"name": "text_files", "path": str(tmp_path / "texts"), "cache_dir": str(tmp_path / "cache")}
    data |= {"load_weights_only": True, "train_loader": {"dataset": dataset | {"split": "train"}}}
    data["eval_loader"] = {"dataset": dataset | {"split": "validation"}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data | more))
    return path


def test_the_rule_of_a_run_is_on_record_and_holds_for_its_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert convert_main(["from-hf", str(llama(tmp_path / "theirs")), str(tmp_path / "ours")]) == 0
    path = recipe(tmp_path, tmp_path / "ours")
    assert train_main([str(path)]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["tokenizer"]["add_bos"] is True and config["tokenizer"]["parse_special_tokens"] is False
    assert train_main([str(path), "max_duration=3ba", "autoresume=true"]) == 0
    spelled = ours(capsys, tmp_path / "run", CHAT)
    assert spelled.startswith(CHAT), "it was text in training, and is text now"
    parsed = ours(capsys, tmp_path / "run", CHAT, "--parse-special")
    assert parsed.startswith("alpha") and not parsed.startswith("<|im_start|>")


def test_a_run_from_before_there_was_a_rule_goes_on_without_bos(tmp_path: Path) -> None:
    assert convert_main(["from-hf", str(llama(tmp_path / "theirs")), str(tmp_path / "ours")]) == 0
    path = recipe(tmp_path, tmp_path / "ours", tokenizer={"name": str(tmp_path / "theirs"), "add_bos": False})
    assert train_main([str(path), "save_interval=1ba"]) == 0
    run = tmp_path / "run"
    for file in (run / "config.yaml", *run.glob("checkpoints/step-*/config.yaml")):
        data = yaml.safe_load(file.read_text())
        del data["tokenizer"]["add_bos"], data["tokenizer"]["parse_special_tokens"]
        file.write_text(yaml.safe_dump(data))
    for folder in run.glob("checkpoints/step-*"):
        files = read_manifest(folder).files | {"config.yaml": measure(folder / "config.yaml")}
        (folder / MANIFEST).unlink()
        write_manifest(folder, int(folder.name.removeprefix("step-")), files)
    data = yaml.safe_load(path.read_text())
    del data["tokenizer"]["add_bos"]
    path.write_text(yaml.safe_dump(data))
    assert train_main([str(path), "max_duration=4ba", "autoresume=true"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["tokenizer"]["add_bos"] is False


def test_a_tokenizer_beyond_the_embedding_is_one_line_and_the_embedding_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = llama(tmp_path / "theirs", extra=2)
    assert convert_main(["from-hf", str(folder), str(tmp_path / "ours")]) == 0
    n = len(tokenizer())
    greedy = ["--checkpoint", str(tmp_path / "ours"), "--temperature", "0", "--max-new-tokens", "3"]
    assert generate_main([*greedy, "--prompt", "alpha <extra1>"]) == 2
    assert f"id {n + 1}, and the model's embedding has {n} rows" in capsys.readouterr().err
    assert generate_main([*greedy, "--prompt", "alpha"]) == 0, "other prompts need no more rows"
    assert generate_main([*greedy, "--prompt", "alpha <extra1>", f"model.vocab_size={n + 2}"]) == 0
    path = recipe(tmp_path, tmp_path / "ours")
    assert train_main([str(path)]) == 2
    assert f"write model.vocab_size={n + 2} or more" in capsys.readouterr().err
    for source in (str(tmp_path / "ours"), f"hf:{folder}"):
        run = tmp_path / source.replace("/", "-").replace(":", "-")
        grown = [f"model.vocab_size={n + 8}", f"load_path={source}", f"save_folder={run}", "optimizer.lr=1e-30"]
        assert train_main([str(path), *grown]) == 0
        assert convert_main(["to-hf", str(run), f"{run}-hf"]) == 0
        before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        after = AutoModelForCausalLM.from_pretrained(f"{run}-hf").state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            torch.testing.assert_close(after[name][:n], before[name])
            torch.testing.assert_close(after[name][n:], before[name].mean(0).expand(8, -1))


def test_generation_stops_at_every_stop_id(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = llama(tmp_path / "theirs")
    fast, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(**fast("alpha", return_tensors="pt"), max_new_tokens=12, do_sample=False)[0].tolist()
    stop = ids[-4]
    folder = llama(tmp_path / "stops", stops=[1, stop])
    assert convert_main(["from-hf", str(folder), str(tmp_path / "ours")]) == 0
    assert stop_tokens(tmp_path / "ours") == {1, stop}
    text = fast.decode(ids[: ids.index(stop)], skip_special_tokens=True)
    assert ours(capsys, tmp_path / "ours", "alpha") == text
    assert theirs(folder, "alpha", 12).startswith(text)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
def test_a_malformed_generation_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match="generation_config.json"):
        stop_tokens(tmp_path)


def test_add_bos_needs_a_bos() -> None:
    bpe = TokenizerConfig(add_bos=True)
    plain = Fast(tokenizer_object=train_bpe(["a b"], 258), eos_token="<|endoftext|>")
    with pytest.raises(ConfigError, match=r"tokenizer.add_bos: the tokenizer has no BOS"):
        bpe.special_tokens(plain)


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "ab1" * 300_000])
def test_a_long_word_does_not_stop_bpe(text: str) -> None:
    started = time.process_time()
    assert train_bpe([TEXT, text], 300).encode(text).ids
    assert time.process_time() - started < 30  # it is 2 s, and was without end
    assert "".join(_bounded(text)) == text
    for ordinary in (TEXT, "x" * 511, "", "a" * 511 + " " + "b" * 511):
        assert list(_bounded(ordinary)) == [ordinary], "nothing changes for ordinary text"


TORCHRUN = [*forks.TORCHRUN, "--standalone", "--nproc-per-node", "2"]


@pytest.mark.dist
def test_two_processes_evaluate_and_sample_as_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert convert_main(["from-hf", str(llama(tmp_path / "theirs")), str(tmp_path / "ours")]) == 0
    path = recipe(tmp_path, tmp_path / "ours")
    data = yaml.safe_load(path.read_text())
    ffn = {"ffn_type": "moe", "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    data["model"] |= {"ffn_config": ffn, "lora": None}
    del data["load_path"], data["load_weights_only"]
    path.write_text(yaml.safe_dump(data | {"tokenizer": {"name": str(tmp_path / "ours" / "tokenizer")}}))
    assert train_main([str(path)]) == 0
    run = ["--checkpoint", str(tmp_path / "run")]
    bounded = ["eval_subset_num_batches=1", "device_eval_batch_size=3"]  # three rows, on any number of processes
    capsys.readouterr()
    assert eval_main([*run, *bounded]) == 0
    assert generate_main([*run, "--prompt", "alpha", "--max-new-tokens", "8", "--seed", "3"]) == 0
    alone = capsys.readouterr().out
    script = (
        "import sys\nfrom llmfoundry.cli.inference import eval_main, generate_main\n"
        "from llmfoundry.launch import leave\n"
        "main = {'eval': eval_main, 'generate': generate_main}[sys.argv[1]]\nleave(main(sys.argv[2:]))"
    )
    (tmp_path / "main.py").write_text(script)
    together = ""
    for name, options in (
        ("eval", [*bounded, "parallel.expert=2"]),
        ("generate", ["--prompt", "alpha", "--max-new-tokens", "8", "--seed", "3"]),
    ):
        done = forks.run(*TORCHRUN, str(tmp_path / "main.py"), name, *run, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        together += done.stdout
    assert together == alone
