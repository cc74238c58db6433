"""More bad checkpoints and settings than test_convert.py has: one clear error, and nothing left of the output."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from theirs import CASES

from llmfoundry.checkpoint.manifest import verify
from llmfoundry.cli.convert import convert_main
from llmfoundry.config import ConfigError, check
from llmfoundry.hf import from_pretrained, load_weights, save_pretrained
from llmfoundry.hf.family import read_config, write_config
from llmfoundry.hf.files import INDEX, WEIGHTS, new_folder
from llmfoundry.model.transformer import CausalLMConfig

QUERIES = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint in several files."""
    folder = tmp_path_factory.mktemp("sound") / "theirs"
    case = next(case for case in CASES if case.model_type == "mixtral")
    case.build().save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    copy = tmp_path / "theirs"
    copy.mkdir()
    for file in sound.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def file_with(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_config(**settings: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return edit


def edit_index(name: str, file: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][name] = file
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = file_with(folder, QUERIES)
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)
        index = json.loads((folder / INDEX).read_text())
        names = {name: where for name, where in index["weight_map"].items() if where != file.name}
        index["weight_map"] = names | dict.fromkeys(tensors, file.name)
        (folder / INDEX).write_text(json.dumps(index))

    return change


def cut(count: int) -> Callable[[Path], None]:
    def shorten(folder: Path) -> None:
        file = file_with(folder, QUERIES)
        file.write_bytes(file.read_bytes()[:count])

    return shorten


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def twice(folder: Path) -> None:
    file = file_with(folder, QUERIES)
    (folder / "more.safetensors").write_bytes(file.read_bytes())
    edit_index(next(name for name in load_file(file) if name != QUERIES), "more.safetensors")(folder)


def lie(folder: Path) -> None:
    edit_index("model.nothing", file_with(folder, QUERIES).name)(folder)


def edit_header(edit: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[Path], None]:
    """Another header before the same bytes of tensors."""

    def change(folder: Path) -> None:
        file = file_with(folder, QUERIES)
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        edit(entries)
        head = json.dumps(entries).replace("Infinity", "1e400").encode()
        file.write_bytes(len(head).to_bytes(8, "little") + head + content[end:])

    return change


def same_bytes(entries: dict[str, dict[str, object]]) -> None:
    other = next(name for name in entries if name not in (QUERIES, "__metadata__"))
    (start, _), (first, last) = (entries[name]["data_offsets"] for name in (QUERIES, other))  # type: ignore[misc]
    entries[other]["data_offsets"] = [start, start + last - first]


BAD = {
    "a place that is infinite": (
        edit_header(lambda e: e[QUERIES].update(data_offsets=[0, math.inf])),
        "malformed header",
    ),
    "a shape that is infinite": (edit_header(lambda e: e[QUERIES].update(shape=[math.inf, 32])), "malformed header"),
    "a shape in fractions": (edit_header(lambda e: e[QUERIES].update(shape=[31.5, 32])), "malformed header"),
    "a place below zero": (edit_header(lambda e: e[QUERIES].update(data_offsets=[-4096, 0])), "malformed header"),
    "two tensors over the same bytes": (edit_header(same_bytes), "overlap"),
    "layers beyond all tensors": (edit_config(num_hidden_layers=900), "config.json says 900 layers and 4 experts"),
    "layers beyond all memory": (edit_config(num_hidden_layers=10**12), "10000 is the most that is read"),
    "experts beyond all tensors": (edit_config(num_local_experts=60_000), "and 60000 experts"),
    "a config as deep as a well": (overwrite("config.json", b"[" * 100_000), "is not valid JSON"),
    "a missing tensor": (
        edit_tensors(lambda t: t.update({QUERIES.replace("q_proj", "q_prj"): t.pop(QUERIES)})),
        f"tensor {QUERIES!r} is missing; the nearest that is there is 'model.layers.0.self_attn.q_prj.weight'",
    ),
    "an extra tensor": (
        edit_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.weights": torch.zeros(1)})),
        f"has no place in a mixtral model of this config.json; the nearest that has a place is {QUERIES!r}",
    ),
    "a layer too few in the config": (edit_config(num_hidden_layers=1), "has no place in a mixtral model"),
    "an index with an absolute path": (edit_index(QUERIES, "/etc/passwd"), "which is outside of this folder"),
    "an index with a Windows path": (edit_index(QUERIES, "..\\else.safetensors"), "which is outside of this folder"),
    "an index that lies": (lie, "has no tensor 'model.nothing', which model.safetensors.index.json says is in it"),
    "an index that is not valid JSON": (overwrite(INDEX, b"{"), "is malformed"),
    "an index of another kind": (overwrite(INDEX, b"[]"), "is malformed"),
    "a shard cut in its tensors": (cut(-100), "is cut short"),
    "a shard cut in its header": (cut(20), "is cut short"),
    "an empty shard": (cut(0), "is cut short"),
    "the same tensor twice": (twice, "has it too"),
    "a config that is a list": (overwrite("config.json", b"[]"), "must hold a mapping"),
    "an unknown model type": (
        edit_config(model_type="vit"),
        "model_type 'vit' is not supported; supported are dbrx, ",
    ),
    "part of a head rotates": (
        edit_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor is not supported",
    ),
    "a setting of the wrong type": (edit_config(hidden_size="wide"), "hidden_size"),
    "a quantised tensor": (
        edit_tensors(lambda t: t.update({QUERIES: torch.zeros(32, 32, dtype=torch.int8)})),
        "has dtype I8; weights are one of F64, F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(
    what: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    spoil, says = BAD[what]
    spoil(folder)
    capsys.readouterr()
    assert convert_main(["from-hf", str(folder), str(tmp_path / "ours")]) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert message[-1].startswith("error: ") and says in message[-1], message
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_tied_model_may_repeat_its_embedding_and_no_other_head(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.model_type == "llama" and "tied" in case.about)
    case.build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / WEIGHTS)
    assert from_pretrained(tmp_path).model.lm_head is None
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match="ties the embeddings, but 'lm_head.weight' is not 'model.embed_tokens"):
        from_pretrained(tmp_path)


def test_gpt2_files_of_the_bare_decoder_with_masks_are_read(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.model_type == "gpt2" and case.about == "tied")
    theirs = case.build()
    theirs.save_pretrained(tmp_path)
    old = {name.removeprefix("transformer."): value for name, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(old | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, tmp_path / WEIGHTS)
    assert torch.equal(from_pretrained(tmp_path).model.wpe.weight, theirs.transformer.wpe.weight)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing(failure: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(failure), new_folder(tmp_path / "out") as temporary:
        (temporary / "half").write_text("done")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_family_can_hold_is_named_with_what_is_lacking(tmp_path: Path) -> None:
    data = {
        "d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 50, "norm_type": "rmsnorm", "no_bias": True,
        "attn_config": {"rope": True},
        "ffn_config": {"ffn_type": "moe", "moe_num_experts": 4, "ffn_act_fn": {"name": "silu"},
                       "moe_capacity_factor": 1.5},
    }  # fmt: skip
    config = check(CausalLMConfig, data)
    with pytest.raises(ConfigError, match=r"no supported family can hold .* lacks .*moe_capacity_factor=1.5"):
        write_config(config)
    with pytest.raises(ConfigError, match="moe_capacity_factor"):
        save_pretrained(config.build(), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_not_filled(folder: Path) -> None:
    model = from_pretrained(folder).model
    other = model.config.model_copy(update={"norm_eps": 0.5}).build()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ConfigError, match="model.norm_eps: is 0.5, but 1e-05 in"):
        load_weights(other, folder)
    # Bits, for what is not yet initialised may be nan.
    assert all(torch.equal(v.view(torch.int32), before[n].view(torch.int32)) for n, v in other.state_dict().items())


def test_mixtures_in_odd_layers_are_refused() -> None:
    settings = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "mlp_only_layers": [1, 2]}
    with pytest.raises(ConfigError, match=r"mixtures in layers \[0, 3, 4, 5\] are not supported"):
        read_config(settings)


def test_a_setting_that_no_rule_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx=True is not supported"):
        read_config({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True})
    with pytest.raises(ConfigError, match="swiglu_alpha=2.0 is not supported, only 1.702"):
        read_config({"model_type": "gpt_oss", "swiglu_alpha": 2.0})


def test_the_generation_config_comes_back(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    assert convert_main(["from-hf", str(folder), str(tmp_path / "ours")]) == 0
    assert convert_main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["temperature"] == 0.25
    assert verify(tmp_path / "ours").files["generation_config.json"].bytes > 0
