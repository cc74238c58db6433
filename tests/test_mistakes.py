"""Every mistake in a config is named where it stands; plug-ins are imported, or refused by file and line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llmfoundry.model.transformer  # noqa: F401  registers its model
from llmfoundry.config import ConfigError, check, import_code
from llmfoundry.layers.rope import RopeScaling
from llmfoundry.model.config import ModelConfig

MODEL = {"name": "causal_lm", "d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 320}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    ("keys", "where"),
    [
        (lambda x: {"expansion_ratio": x}, "expansion_ratio"),
        (lambda x: {"attn_config": {"rope": True, "rope_theta": x}}, "attn_config.rope_theta"),
        (lambda x: {"attn_config": {"rope_scaling": YARN | {"mscale": x}}}, "attn_config.rope_scaling.mscale"),
    ],
)
def test_no_number_is_infinite_or_nan(number: float, keys: Callable[[float], dict[str, object]], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(ModelConfig, MODEL | keys(number), where="model")
    assert f"model.{where}: input should be a finite number, found {number}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"type": "linear", "factor": 0.0},
        LLAMA3 | {"low_freq_factor": 0.0},
        LLAMA3 | {"original_max_position_embeddings": 0},
        YARN | {"factor": -1.0},
        YARN | {"beta_slow": 0.0},
        YARN | {"attention_factor": 0.0},
    ],
)
def test_rope_takes_no_number_that_it_would_divide_by_zero_with(keys: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="input should be greater than 0"):
        check(RopeScaling, keys)
    with pytest.raises(ConfigError, match=r"rope_theta: input should be greater than 0"):
        check(ModelConfig, MODEL | {"attn_config": {"rope": True, "rope_theta": 0.0}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import os\nimport no_such_module\n", ":2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\n\ndef f(:\n", ":3: SyntaxError: invalid syntax"),
        ("def f():\n    return 1 / 0\n\nf()\n", ":2: ZeroDivisionError: division by zero"),
        ("import json\n\njson.loads('no')\n", ":3: JSONDecodeError: Expecting value"),
        (
            "from llmfoundry.registry import callbacks\n",
            ":1: ModuleNotFoundError: No module named 'llmfoundry.registry'; rewrite LLM Foundry plug-ins",
        ),
    ],
)
def test_broken_plug_in_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    for _ in range(2):  # a second try does not find a half-made module
        with pytest.raises(ConfigError) as caught:
            import_code([str(file)])
        assert str(caught.value).startswith(f"code_paths: {file}{says}") and "\n" not in str(caught.value)


def test_plug_in_shadows_no_module_and_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "json.py"
    file.write_text("import sys\nsys.plug_in_runs = getattr(sys, 'plug_in_runs', 0) + 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "plug_in_runs", 0, raising=False)
    import_code([str(file), "json.py"])
    import_code([str(file)])
    assert sys.modules["json"] is json and sys.plug_in_runs == 1
    monkeypatch.delitem(sys.modules, "llmfoundry_plugin_json")


def test_plug_in_is_one_python_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.txt").write_text("")
    with pytest.raises(ConfigError, match=r"code\.txt: is not a Python file; its name must end in \.py"):
        import_code([str(tmp_path / "code.txt")])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("")
    with pytest.raises(ConfigError, match=r"b/mine\.py: .*a/mine\.py has that name too; rename one"):
        import_code([str(tmp_path / "a" / "mine.py"), str(tmp_path / "b" / "mine.py")])
    monkeypatch.delitem(sys.modules, "llmfoundry_plugin_mine")
