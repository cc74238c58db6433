"""The check before torch says nothing that the full check does not say in the same words."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmfoundry.callbacks  # noqa: F401  registers those that the YAMLs name
from llmfoundry.cli.quick_check import SCHEMA, mistakes_in, quick_mistakes
from llmfoundry.config import Choice, ConfigError, check, dump
from llmfoundry.settings import load_yaml
from llmfoundry.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
MOE = ROOT / "yamls" / "moe.yaml"
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
VALUES = [None, "x", "10xx", "", True, -1, 0, 1.5, float("nan"), float("inf"), [], ["a"], [1], {}, {"name": "x"},
          {"name": 3}, {"a": 1}]  # fmt: skip
KEYS = ["d_modle", "lr", "rank", "r", "max_epochs", "learning_rate", "shuffle_algo", "moe_topk", "pin_memory", "zzz"]
EVERYWHERE = {
    "callbacks": {"generate_callback": {"prompts": ["a"], "interval": 1}, "memory_snapshot": None, "lr_monitor": {}},
    "loggers": {"wandb": {"project": "a"}, "mlflow": {"tags": {"a": 1}}},
    "icl_tasks": [{"label": "a", "dataset_uri": "a.jsonl", "num_fewshot": [0], "icl_task_type": "multiple_choice"}],
    "optimizer": {"name": "adamw", "lr": 1.0, "param_groups": [{"param_str_match": "a", "lr": 2.0}]},
    "eval_loaders": [{"label": "b", "dataset": {"name": "mds", "streams": {"a": {"local": "a", "repeat": 2}}}}],
}


@pytest.fixture(autouse=True)
def only_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the plug-ins that other tests of this process have registered, for the errors list what is known."""
    for root in (member for member in Choice.__subclasses__() if not member._names):
        kept = {name: part for name, part in root._members.items() if part.__module__.startswith("llmfoundry.")}
        monkeypatch.setattr(root, "_members", kept)


def _full(data: dict[str, object]) -> list[str]:
    try:
        check(RunConfig, data)
    except ConfigError as error:
        return str(error).split("\n")
    return []


def _places(data: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    if isinstance(data, dict | list):
        for key, item in data.items() if isinstance(data, dict) else enumerate(data):
            yield (*path, key)
            yield from _places(item, (*path, key))


def _put(data: dict[str, object], path: tuple[object, ...], value: object) -> dict[str, object]:
    changed = copy.deepcopy(data)
    node = changed
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return changed


def _at(data: dict[str, object], path: tuple[object, ...]) -> object:
    for part in path:
        data = data[part]
    return data


def _spoilt(data: dict[str, object]) -> Iterator[dict[str, object]]:
    """The data with one mistake, at each place another one of several kinds in turn."""
    values, keys = itertools.cycle(VALUES), itertools.cycle(KEYS)
    for path in list(_places(data)):
        yield from (_put(data, path, next(values)) for _ in range(5))
        if isinstance(_at(data, path), dict):
            yield from (_put(data, (*path, next(keys)), 1) for _ in range(3))


@pytest.mark.parametrize("path", YAMLS, ids=[path.stem for path in YAMLS])
def test_a_right_file_has_no_mistakes(path: Path) -> None:
    assert quick_mistakes(str(path), []) == []
    assert mistakes_in(dump(check(RunConfig, load_yaml(path)))) == []


@pytest.mark.parametrize("name", ["moe", "mixture", "lora", "everywhere"])
def test_each_line_is_one_of_the_full_check(name: str) -> None:
    data = load_yaml(ROOT / "yamls" / f"{name}.yaml") if name != "everywhere" else load_yaml(MOE) | EVERYWHERE
    n_wrong = n_same = 0
    for spoilt in _spoilt(data):
        quick, full = mistakes_in(spoilt), _full(spoilt)
        assert not set(quick) - set(full)
        n_wrong += bool(full)
        n_same += bool(full) and quick == full
    assert n_same > 0.7 * n_wrong > 100


@pytest.mark.parametrize("name", ["moe", "dbrx-132b"])
def test_each_line_is_one_of_the_full_check_where_defaults_are_written_out(name: str) -> None:
    for number, spoilt in enumerate(_spoilt(dump(check(RunConfig, load_yaml(ROOT / "yamls" / f"{name}.yaml"))))):
        if number % 3 == 0:
            assert not set(mistakes_in(spoilt)) - set(_full(spoilt))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.d_modle=3", "seed=a", "max_duration=3xx", "learning_rate=1"],
        ["model.attn_config.rope_theta=.inf"],
        ["model.attn_config.rope_scaling={type: linear, factor: 0.0}"],
        ["optimizer.betas=[0.9]"],
        ["optimizer.disable_grad=[1]"],
        ["model.lora={r: 0, alpha: 2}"],
        ["callbacks.lr_moniter={}"],
        ["~max_seq_len"],
        ["save_folder=runs/{run_name}", "run_name=a", "seeed=1"],
    ],
)
def test_a_mistake_of_a_key_is_answered_in_the_same_words(overrides: list[str]) -> None:
    data = load_yaml(MOE, overrides)
    assert mistakes_in(data) == _full(data) != []


@pytest.mark.parametrize(
    "overrides",
    [
        ["code_paths=[mine.py]", "seeed=1"],  # it may bring choices of its own
        ["model.ffn_config.ffn_type=mptglu"],  # the keys of the mixture are dropped
        ["~model.ffn_config.ffn_type", "model.ffn_config.bias=true"],
        ["save_folder=runs/{run_name}", "seeed=1"],  # reported alone
        ["model.name=hf_causal_lm", "seeed=1"],
    ],
)
def test_it_says_nothing_where_it_is_not_sure(overrides: list[str]) -> None:
    assert quick_mistakes(str(MOE), overrides) == []


def test_words_of_llm_foundry_are_translated_first() -> None:
    assert quick_mistakes(str(MOE), ["model.init_device=meta", "eval_interval=1"]) == []
    assert quick_mistakes(str(MOE), ["load_ignore_keys=[a]", "seeed=1"]) == [
        "load_ignore_keys: ['a'] is not supported; write load_weights_only: true to leave out optimizer and progress, "
        "and load_allow for what may differ",
        "seeed: unknown key (did you mean 'seed'?)",
    ]


def test_it_answers_without_torch_and_the_rest_follows_once() -> None:
    spoilt = [str(MOE), "seeed=1", "model.attn_config.kv_n_heads=3"]
    program = f"""
import sys
from llmfoundry.cli.quick_check import quick_mistakes
print(*quick_mistakes({spoilt[0]!r}, {spoilt[1:]!r}))
print(*sorted({{"torch", "transformers", "numpy"}} & sys.modules.keys()))
"""
    quick = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert quick.stdout == "seeed: unknown key (did you mean 'seed'?)\n\n"
    full = subprocess.run(
        [sys.executable, "scripts/train.py", *spoilt], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    first, second = full.stderr.splitlines()
    assert full.returncode == 2 and first == f"error: {quick.stdout.strip()}"
    assert second.startswith("error: model: ") and "kv_n_heads=3" in second


def test_a_schema_older_than_the_code_stops_no_run(tmp_path: Path) -> None:
    old = json.loads(SCHEMA.read_text(encoding="utf-8"))
    del old["definitions"]["RunConfig"]["properties"]["seed"]
    (tmp_path / "schema.json").write_text(json.dumps(old))
    program = f"""
import logging
from pathlib import Path
from llmfoundry.cli import command, quick_check
logging.basicConfig(format="%(message)s")
quick_check.SCHEMA = Path({str(tmp_path / "schema.json")!r})
print(command.read_run_config({str(MOE)!r}, []).seed)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.returncode == 0 and ran.stdout == "17\n"
    first, second = ran.stderr.splitlines()
    assert first.startswith("error: seed: unknown key") and second.startswith(
        "no error after all: schema.json is older"
    )
