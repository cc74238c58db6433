"""Stop ids, chat template and special tokens go through a run: Hugging Face, ours, training, Hugging Face."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from theirs import CASES
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from llmfoundry import hf
from llmfoundry.cli.convert import convert_main
from llmfoundry.cli.train import train_main
from llmfoundry.data.tokenizer import END_OF_TEXT, train_bpe

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TOOLS = "{{ tools }}" + TEMPLATE
STOPS = {"bos_token_id": 0, "eos_token_id": [1, 5, 9]}
CHAT = {**STOPS, "pad_token_id": 5, "do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "theirs"
    case = next(case for case in CASES if case.model_type == "llama")
    case._replace(settings=case.settings | {"vocab_size": 300}).build().save_pretrained(folder)
    bpe = train_bpe(["hello world, a text to learn merges from "] * 5, 290)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TOOLS}
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "theirs")
    return tmp_path / "theirs"


def with_file(said: dict[str, object]) -> Callable[[Path], None]:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(said)) and None


def in_config(folder: Path) -> None:
    """No file, but the ids in config.json."""
    (folder / "generation_config.json").unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | STOPS))


def train(tmp_path: Path, recipe: Path, *overrides: str, name: str = "run") -> Path:
    data = f"{{name: synthetic, n_documents: 30, document_words: 40, cache_dir: {tmp_path / 'cache'}}}"
    plain = yaml.safe_load(recipe.read_text()) | {
        "max_seq_len": 16,
        "global_train_batch_size": 2,
        "log_to_console": False,
    }
    plain["train_loader"] = {"dataset": yaml.safe_load(data)}
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(plain))
    assert train_main([str(recipe), "max_duration=1ba", f"save_folder={tmp_path / name}", *overrides]) == 0
    return tmp_path / name


def back(tmp_path: Path, run: Path) -> Path:
    out = tmp_path / f"{run.name}-back"
    assert convert_main(["to-hf", str(run), str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        pytest.param(with_file(STOPS), STOPS, id="several stop ids"),
        pytest.param(with_file(CHAT), CHAT, id="sampling too"),
        pytest.param(in_config, STOPS, id="in config.json alone"),
        pytest.param(with_file({"eos_token_id": 7}), {"eos_token_id": 7}, id="another one than the tokenizer's"),
    ],
)
def test_stop_ids_and_template_survive_training_and_resuming(
    theirs: Path, tmp_path: Path, prepare: Callable[[Path], None], expected: dict[str, object]
) -> None:
    prepare(theirs)
    ours = tmp_path / "ours"
    assert convert_main(["from-hf", str(theirs), str(ours)]) == 0
    run = train(tmp_path, ours / "config.yaml", f"load_path={ours}", "load_weights_only=true")
    train(tmp_path, ours / "config.yaml", "max_duration=2ba", "autoresume=true", f"load_path={ours}",
          "load_weights_only=true")  # fmt: skip
    assert (run / "checkpoints" / "step-2" / "generation_config.json").is_file()
    out = back(tmp_path, run)
    assert json.loads((out / "generation_config.json").read_text()) == expected
    assert GenerationConfig.from_pretrained(out).eos_token_id == expected["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == {"default": TEMPLATE, "tool_use": TOOLS}
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.all_special_tokens)


def test_a_run_on_the_folder_itself_keeps_them_too(theirs: Path, tmp_path: Path) -> None:
    with_file(CHAT)(theirs)
    assert convert_main(["from-hf", str(theirs), str(tmp_path / "ours")]) == 0
    first = train(tmp_path, tmp_path / "ours" / "config.yaml", f"load_path=hf:{theirs}")
    second = train(
        tmp_path, tmp_path / "ours" / "config.yaml", f"load_path={first}", "load_weights_only=true", name="second"
    )
    out = back(tmp_path, second)
    assert json.loads((out / "generation_config.json").read_text()) == CHAT


def test_a_model_that_is_saved_in_python_keeps_them(theirs: Path, tmp_path: Path) -> None:
    with_file(CHAT)(theirs)
    model, tokenizer = hf.from_pretrained(theirs)
    hf.save_pretrained(model, tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == CHAT


def test_another_tokenizer_takes_no_ids_of_the_old_one(theirs: Path, tmp_path: Path) -> None:
    with_file(STOPS)(theirs)
    ours = tmp_path / "ours"
    assert convert_main(["from-hf", str(theirs), str(ours)]) == 0
    other = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(["another text entirely "] * 9, 280), eos_token=END_OF_TEXT
    )
    other.save_pretrained(tmp_path / "other")
    run = train(
        tmp_path, ours / "config.yaml", f"load_path={ours}", "load_weights_only=true",
        f"tokenizer.name={tmp_path / 'other'}", "load_allow=[tokenizer]",
    )  # fmt: skip
    out = back(tmp_path, run)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 0}


def test_a_grown_mixture_keeps_them(theirs: Path, tmp_path: Path) -> None:
    with_file(CHAT)(theirs)
    assert convert_main(["from-hf", str(theirs), str(tmp_path / "dense")]) == 0
    for name, source in (("from-theirs", theirs), ("from-ours", tmp_path / "dense")):
        grown = tmp_path / name
        assert convert_main(["upcycle", str(source), str(grown), "moe_num_experts=4", "moe_top_k=2"]) == 0
        assert json.loads((grown / "generation_config.json").read_text()) == CHAT


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("{", "is not valid JSON", id="cut"),
        pytest.param("[1]", "must hold a mapping, found list", id="list"),
        pytest.param('{"eos_token_id": "</s>"}', "must be a token id", id="text"),
        pytest.param('{"eos_token_id": [1, 1e400]}', "is not valid JSON", id="infinity"),
        pytest.param("[" * 100_000, "is not valid JSON", id="deep"),
    ],
)
def test_a_bad_file_is_one_line(
    theirs: Path, tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (theirs / "generation_config.json").write_text(text)
    assert convert_main(["from-hf", str(theirs), str(tmp_path / "ours")]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "generation_config.json: " in message and says in message
    assert not (tmp_path / "ours").exists()
