"""A YAML written for LLM Foundry is one of ours: renamed words are translated out loud, the rest is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from llmfoundry.cli.command import read_run_config, read_translated
from llmfoundry.cli.evaluation_yaml import translated as of_evaluation
from llmfoundry.cli.quick_check import quick_mistakes
from llmfoundry.config import ConfigError, check, dump
from llmfoundry.data import foundry_tasks
from llmfoundry.integrations.explain import explained
from llmfoundry.integrations.foundry_keys import EMPTY, INSTEAD, ONLY, REFUSED, REFUSED_VALUES, TASKS
from llmfoundry.integrations.foundry_yaml import OTHER_MODELS, Untranslated, translate
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig

# In the words of LLM Foundry v0.22, for a mixture of experts.
FOUNDRY = {
    "variables": {"data_local": "texts", "max_seq_len": 128, "global_seed": 17},
    "max_seq_len": "${variables.max_seq_len}",
    "run_name": "mpt-moe",
    "model": {
        "name": "mpt_causal_lm",
        "init_device": "mixed",
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "expansion_ratio": 2,
        "max_seq_len": "${variables.max_seq_len}",
        "vocab_size": 320,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "attn_config": {
            "attn_type": "grouped_query_attention",
            "kv_n_heads": 2,
            "attn_impl": "flash",
            "attn_pdrop": 0.0,
            "rope": True,
            "rope_impl": "hf",
            "rope_hf_config": {"type": "no_scaling", "factor": 1.0},
        },
        "ffn_config": {
            "ffn_type": "mb_dmoe",
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_world_size": 1,
            "moe_weight_parallelism": False,
            "uniform_expert_assignment": False,
            "moe_loss_weight": 0.05,
            "moe_normalize_expert_weights": 1.0,
            "moe_lbl_in_fp32": False,
            "mlp_type": "glu",
            "mlp_impl": "grouped",
            "ffn_act_fn": {"name": "silu"},
        },
        "loss_fn": "torch_crossentropy",
    },
    "tokenizer": {"name": "bpe", "vocab_size": 300},
    "train_loader": {
        "name": "text",
        "dataset": {"name": "synthetic", "split": "train"},
        "drop_last": True,
        "num_workers": 8,
    },
    "scheduler": {"name": "cosine_with_warmup", "t_warmup": "100ba", "alpha_f": 0.1},
    "optimizer": {"name": "decoupled_adamw", "lr": 6.0e-4, "betas": [0.9, 0.95], "eps": 1.0e-8, "weight_decay": 0.0},
    "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
    "max_duration": "4800ba",
    "eval_interval": "500ba",
    "eval_first": False,
    "eval_subset_num_batches": -1,
    "global_train_batch_size": 256,
    "seed": "${variables.global_seed}",
    "device_eval_batch_size": 16,
    "device_train_microbatch_size": 16,
    "precision": "amp_bf16",
    "fsdp_config": {
        "sharding_strategy": "FULL_SHARD",
        "mixed_precision": "PURE",
        "activation_checkpointing": True,
        "activation_checkpointing_reentrant": False,
        "activation_cpu_offload": False,
        "limit_all_gathers": True,
    },
    "progress_bar": False,
    "log_to_console": True,
    "console_log_interval": "1ba",
    "callbacks": {
        "speed_monitor": {"window_size": 10},
        "lr_monitor": {},
        "memory_monitor": {},
        "runtime_estimator": {},
    },
    "save_folder": "runs/mpt-moe",
}


def test_a_whole_file_is_understood_and_says_what_it_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mpt.yaml"
    path.write_text(yaml.safe_dump(FOUNDRY))
    caplog.set_level(logging.INFO)
    config = read_run_config(str(path), [])
    assert config.model.n_params() > 0
    assert config.parallel.recompute == "full" and config.parallel.expert == 1
    for said in ("moe_world_size", "fsdp_config", "init_device", "rope_impl"):
        assert said in caplog.text, said


def changed(path: str, value: object) -> dict[str, object]:
    """The file's data with one value set."""
    data = yaml.safe_load(yaml.safe_dump(FOUNDRY))
    node = data
    *parents, key = path.split(".")
    for parent in parents:
        node = node[parent]
    node[key] = value
    return data


def test_workers_of_an_evaluation_are_said_to_go_if_there_are_any() -> None:
    for workers, n_notes in ((8, 1), (0, 0)):
        data, notes = translate({"eval_loader": {"num_workers": workers}, "save_folder": "runs"})
        assert data == {"eval_loader": {}, "save_folder": "runs"} and len(notes) == n_notes


def test_expert_parallelism_becomes_a_mesh_axis() -> None:
    data, notes = translate(changed("model.ffn_config.moe_world_size", 4))
    assert data["parallel"]["expert"] == 4
    assert any("parallel.expert: 4" in note for note in notes)
    assert "moe_world_size" not in data["model"]["ffn_config"]


@pytest.mark.parametrize(("kind", "kept"), [("mb_dmoe", None), ("torch_dmoe", None), ("mb_moe", 1.25)])
def test_only_the_mixture_that_drops_tokens_takes_a_capacity(kind: str, kept: float | None) -> None:
    tree = changed("model.ffn_config.moe_capacity_factor", 1.25)
    tree["model"]["ffn_config"]["ffn_type"] = kind
    data, notes = translate(tree)
    assert data["model"]["ffn_config"].get("moe_capacity_factor") == kept
    assert any("moe_capacity_factor" in note for note in notes) == (kept is None)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model.use_pad_tok_in_ffn", False, "use_pad_tok_in_ffn: False is not supported"),
        ("model.attn_config.kv_dim", 7, "kv_dim: 7 is for cross-attention"),
        ("fsdp_config.sharding_strategy", "HYBRID_SHARD", "write parallel: {replicate:"),
        ("fsdp_config.activation_cpu_offload", True, "use parallel.recompute"),
        ("fsdp_config.typo", 1, "fsdp_config.typo: unknown key"),
    ],
)
def test_what_would_change_the_result_is_refused(path: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        translate(changed(path, value))


def test_the_data_that_is_translated_stays_as_it_was() -> None:
    before = yaml.safe_dump(FOUNDRY)
    translate(FOUNDRY)
    assert yaml.safe_dump(FOUNDRY) == before


SIZES = {"name": "mpt_causal_lm", "d_model": 16, "n_heads": 4, "n_layers": 1, "vocab_size": 11}


def test_an_mpt_model_with_alibi_is_valid_here() -> None:
    legacy = {
        "learned_pos_emb": True,  # LLM Foundry's default, which alibi turns off there
        "attn_config": {"attn_impl": "torch", "alibi": True, "alibi_bias_max": 8, "clip_qkv": 6, "attn_pdrop": 0.0},
    }
    data, notes = translate({"model": SIZES | legacy})
    model = check(ModelConfig, data["model"])
    assert isinstance(model, CausalLMConfig) and not model.has_learned_positions
    assert model.attn_config.alibi and model.attn_config.attn_impl == "sdpa"
    assert any("learned_pos_emb" in note and "alibi" in note for note in notes)


@pytest.mark.parametrize("learned", [True, False])
def test_learned_positions_without_alibi_or_rope_stay_as_they_are(learned: bool) -> None:
    data, notes = translate({"model": SIZES | {"learned_pos_emb": learned}})
    assert check(ModelConfig, data["model"]).has_learned_positions == learned
    assert not any("learned_pos_emb" in note for note in notes)


def test_all_mistakes_come_in_one_round() -> None:
    tree = changed("model.use_pad_tok_in_ffn", False)
    tree["tp_config"] = {"strategy": "ffn"}
    tree["fsdp_config"] = {"mixed_precision": "FULL"}
    with pytest.raises(ConfigError) as error:
        translate(tree)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and [line.split(":")[0] for line in lines] == [
        "model.use_pad_tok_in_ffn", "tp_config", "fsdp_config.mixed_precision"
    ]  # fmt: skip


def test_mistakes_of_every_kind_come_in_one_round(tmp_path: Path) -> None:
    """Those of the translation, of keys and of values, by both checks."""
    tree = changed("model.use_pad_tok_in_ffn", False) | {"eval_intervall": 1, "optimizer": {"name": "adalr_lion"}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as error:
        read_translated(str(tmp_path / "a.yaml"), [])
    expected = ["model.use_pad_tok_in_ffn", "eval_intervall", "optimizer.name"]
    for lines in (str(error.value).splitlines(), quick_mistakes(str(tmp_path / "a.yaml"), [])):
        assert sorted(line.split(":")[0] for line in lines) == sorted(expected)


def test_a_missing_file_of_tasks_is_named_beside_other_mistakes(tmp_path: Path) -> None:
    tree = changed("model.use_pad_tok_in_ffn", False) | {"icl_tasks": "gone.yaml", "max_duration": "0.5dur"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as error:
        read_translated(str(tmp_path / "a.yaml"), [])
    _, tasks, duration = str(error.value).splitlines()
    assert tasks.startswith("icl_tasks: gone.yaml: no such file") and "is a part of itself" in duration


def test_explain_says_of_each_key_what_it_became(tmp_path: Path) -> None:
    tree = changed("model.block_overrides", yaml.safe_load(CHARACTER)) | {"callbacks": {"lr_monitor": {}}}
    tree["model"]["n_layers"] = 13
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    given, _, _, notes = read_translated(str(tmp_path / "a.yaml"), [])
    lines = {line.split(": ")[0]: line for line in explained(given, notes)}
    assert lines["callbacks.lr_monitor"].split("{}")[1].strip() == "unchanged"
    assert lines["fsdp_config.activation_checkpointing"].split("True")[1].strip() == "is now parallel.recompute: full"
    first = next(line for path, line in lines.items() if path.startswith("model.block_overrides.order"))
    assert "is now model.attn_window_pattern: [-1, 1024" in first and "{" not in first
    assert lines["fsdp_config.limit_all_gathers"].endswith("see fsdp_config")


def test_a_job_file_gives_its_parameters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job: dict[str, object] = {"name": "mpt", "image": "foundry", "command": "composer train.py", "parameters": FOUNDRY}
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    with caplog.at_level(logging.INFO):
        config = read_run_config(str(file), ["seed=3"])
    assert config.model.max_seq_len == 128 and config.seed == 3
    assert "only its parameters are read" in caplog.text
    file.write_text(yaml.safe_dump(job | {"parameters": {}}))
    with pytest.raises(ConfigError, match="job file without parameters; give the YAML file that its command names"):
        read_run_config(str(file), [])


def test_a_model_that_cannot_be_had_is_one_mistake(tmp_path: Path) -> None:
    model = {"name": "hf_causal_lm", "pretrained_model_name_or_path": str(tmp_path / "nothing")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(FOUNDRY | {"model": model, "max_duration": "ten"}))
    with pytest.raises(ConfigError) as found:
        read_run_config(str(file), [])
    lines = str(found.value).splitlines()
    assert len(lines) == 2 and "nothing" in lines[0] and lines[1].startswith("max_duration")


def test_names_of_checkpoints_and_placeholders(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for given, expected in (
        ("ckpt/latest-rank{rank}.pt", "ckpt/latest-rank0.pt"),
        (f"{tmp_path}/run/ep1-ba200-rank0.pt", f"{tmp_path}/run/checkpoints/step-200"),
        ("elsewhere", "elsewhere"),
        (None, None),
    ):
        data, notes = translate(FOREIGN | {"load_path": given})
        assert data["load_path"] == expected and len(notes) == 2 + (given != expected)
    with pytest.raises(ConfigError, match=r"save_folder: a/rank\{rank\}: \{rank\} is not filled in here"):
        translate(FOREIGN | {"save_folder": "a/rank{rank}"})


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        (1, "1ep"),
        (0, "0ep"),
        ("7iter", "7ba"),
        ("5ba", "5ba"),
        (True, True),
        ("90sec", "90s"),
        ("1h30m", "5400s"),
        ("1h0m30s", "3630s"),
        ("5m", "300s"),
        ("2h", "2h"),
        ("10BA", "10ba"),
        ("3Iter", "3ba"),
        ("5e-2dur", "0.05dur"),
        ("1e3ba", "1e3ba"),
        ("10_000ba", "10000ba"),
        ("10 ba", "10ba"),
        (".5dur", "0.5dur"),
        ("1_0_ba", "1_0_ba"),
    ],
)
def test_durations_in_composers_other_spellings(value: object, ours: object) -> None:
    data, notes = translate({"eval_interval": value, "save_folder": "runs"})
    assert data["eval_interval"] == ours and len(notes) == (value != ours)
    if isinstance(value, int):  # neither there nor here does a schedule take a number
        data, notes = translate({"scheduler": {"t_warmup": value}, "save_folder": "runs"})
        assert data["scheduler"] == {"t_warmup": value} and not notes


@pytest.mark.parametrize(
    ("path", "value", "there", "ours"),
    [
        ("compile_config", {}, "compile", True),
        ("fsdp_config", {"data_parallel_shard_degree": 2}, "shard", 2),
        ("fsdp_config", {"data_parallel_replicate_degree": 4}, "replicate", 4),
    ],
)
def test_equivalents_become_keys_of_the_mesh(path: str, value: object, there: str, ours: object) -> None:
    data = translate({path: value, "save_folder": "runs", "save_interval": "1ep"})[0]
    assert data == {"parallel": {there: ours}, "save_folder": "runs", "save_interval": "1ep"}


@pytest.mark.parametrize(
    ("path", "default", "other"),
    [
        ("save_weights_only", False, True),
        ("train_subset_num_batches", -1, 4),
        ("load_strict_model_weights", True, False),
    ],
)
def test_a_key_at_its_default_is_accepted_and_another_value_refused(path: str, default: object, other: object) -> None:
    assert translate({path: default, "save_folder": "runs"})[0] == {"save_folder": "runs"}
    with pytest.raises(ConfigError, match=path):
        translate({path: other})


FOREIGN = {"fsdp_config": {}, "save_folder": "runs", "run_name": "a"}


@pytest.mark.parametrize("path", EMPTY)
def test_what_may_be_empty_is_as_if_left_out(path: str) -> None:
    *parents, key = path.split(".")
    block: dict[str, object] = {key: None}
    for parent in reversed(parents):
        block = {parent: block}
    data, notes = translate({**block, **FOREIGN})
    for parent in parents:
        data = data[parent]
    assert key not in data and not any(note.path == path for note in notes)


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_not_built_is_refused_with_what_to_write(path: str) -> None:
    block, _, key = path.partition(".")
    with pytest.raises(ConfigError) as error:
        translate({block: {key: {}}, **FOREIGN})
    assert str(error.value) == f"{path}: {REFUSED[path]}"


def at(path: str, value: object) -> dict[str, object]:
    *parents, key = path.split(".")
    block: dict[str, object] = {key: value}
    for parent in reversed(parents):
        block = {parent: block}
    return block


@pytest.mark.parametrize("path", INSTEAD)
def test_a_value_that_is_not_done_is_refused_with_what_to_write(path: str) -> None:
    with pytest.raises(ConfigError) as error:
        translate({**at(path, "another"), **FOREIGN})
    assert str(error.value) == f"{path}: 'another' is not supported; {INSTEAD[path]}"
    translate({**at(path, ONLY[path][0]), **FOREIGN})


NAMES = [(path, value) for path, reasons in REFUSED_VALUES.items() for value in reasons]


@pytest.mark.parametrize(("path", "value"), NAMES)
def test_a_name_that_is_not_built_is_refused_with_what_to_write(path: str, value: str) -> None:
    with pytest.raises(Untranslated) as error:
        translate({**at(path, value), **FOREIGN})
    assert str(error.value) == f"{path}: {value} is not supported; {REFUSED_VALUES[path][value]}"
    if path == "optimizer.name":
        assert error.value.rest["optimizer"]["name"], "no second mistake"  # type: ignore[index]


@pytest.mark.parametrize("key", ["activation_checkpointing", "activation_cpu_offload", "cpu_offload"])
def test_a_switch_of_fsdp_that_is_a_text_is_not_on(key: str) -> None:
    """Any text is true in Python, also 'false'."""
    with pytest.raises(ConfigError, match=f"fsdp_config.{key}: must be true or false, found 'false'"):
        translate(FOREIGN | {"fsdp_config": {key: "false"}})


def test_what_the_top_level_leaves_out_is_as_it_is_there() -> None:
    data, notes = translate(FOREIGN | {"eval_loader": {"name": "text", "dataset": {"local": "a"}}})
    assert data["save_interval"] == "1000ba" and data["eval_subset_num_batches"] == -1
    assert "save_interval: is missing; now 1000ba, as LLM Foundry has it" in notes
    ours = {"save_folder": "runs", "eval_loader": {"name": "text"}}
    assert translate(ours)[0] == ours


@pytest.mark.parametrize(
    ("given", "rows", "length"),
    [
        ({"device_train_microbatch_size": 4}, 4, 64),
        ({}, 1, 64),
        ({"device_eval_batch_size": 8, "icl_seq_len": 32}, 8, 32),
    ],
)
def test_evaluations_have_the_rows_and_length_that_they_have_there(
    given: dict[str, object], rows: int, length: int
) -> None:
    data, _ = translate(FOREIGN | {"icl_tasks": "tasks.yaml", "max_seq_len": 64} | given)
    assert (data["device_eval_batch_size"], data["icl_seq_len"]) == (rows, length)
    assert "icl_seq_len" not in translate(FOREIGN | {"max_seq_len": 64})[0]


def test_files_of_checkpoints_may_have_their_defaults_and_be_null() -> None:
    for name in (None, "latest-sharded-rank{rank}"):
        assert translate({"save_latest_filename": name, "save_filename": None, "profiler": {}})[0] == {}


def test_a_name_of_a_dataset_stands_for_its_function() -> None:
    alpaca = {"name": "finetuning", "dataset": {"hf_name": "tatsu-lab/alpaca"}}
    named = {"name": "finetuning", "dataset": {"hf_name": "json", "preprocessing_fn": "Muennighoff/P3"}}
    own = {"name": "finetuning", "dataset": {"hf_name": "tatsu-lab/alpaca", "preprocessing_fn": "my.fns:fn"}}
    data, _ = translate(FOREIGN | {"train_loader": alpaca, "eval_loader": [named, own]})
    found = [each["dataset"]["preprocessing_fn"] for each in (data["train_loader"], *data["eval_loader"])]
    assert found == ["tatsu-lab/alpaca", "Muennighoff/P3", "my.fns:fn"]
    assert set(TASKS) == foundry_tasks.TASKS.keys()


def test_several_evaluations_may_each_say_what_a_loader_says() -> None:
    loader = {"pin_memory": True, "timeout": 0, "num_workers": 8, "drop_last": False}
    data, notes = translate({"eval_loader": [{"label": "a", **loader}, {"label": "b", **loader}], **FOREIGN})
    assert data["eval_loader"] == [{"label": "a", "drop_last": False}, {"label": "b", "drop_last": False}]
    assert any(note.startswith("eval_loader.1.timeout=0: ignored") for note in notes)


def test_what_a_dataset_leaves_out_is_as_it_is_there() -> None:
    loader = {"name": "finetuning", "dataset": {"hf_name": "a"}}
    text = {"name": "text", "dataset": {"local": "a", "shuffle": True}}
    data, notes = translate(FOREIGN | {"train_loader": loader, "eval_loader": [loader, text]})
    chats = {"hf_name": "a", "target_responses": "last", "turn_by_turn": True}
    assert data["train_loader"]["dataset"] == {"shuffle": False} | chats
    assert data["eval_loader"][0]["dataset"] == chats
    assert data["eval_loader"][1] == text and len(notes) == 5 + 4
    assert translate({"train_loader": loader})[0]["train_loader"] == loader, "a file in our words"


def test_a_key_that_only_serves_references_is_a_variable(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    text = yaml.safe_dump(FOUNDRY | {"width": 64, "run_name": "a-${width}", "model": FOUNDRY["model"] | {"d_model": 8}})
    path.write_text(text.replace("d_model: 8", "d_model: ${width}"))
    given, data, _, notes = read_translated(str(path), [])
    assert (given["width"], data["run_name"], data["model"]["d_model"]) == (64, "a-64", 64) and "width" not in data
    assert "width=64: kept as a variable only" in notes
    assert quick_mistakes(str(path), []) == []
    path.write_text(yaml.safe_dump(FOUNDRY | {"width": 64}))
    assert quick_mistakes(str(path), []) == ["width: unknown key"], "nothing refers to it"


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"mixed_precision": {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "bf16"}}, None),
        ({"mixed_precision": "pure"}, None),
        ({"device_mesh": [2, 4], "sharding_strategy": "HYBRID_SHARD"}, {"replicate": 2, "shard": 4}),
        ({"device_mesh": [8]}, {"shard": 8}),
        ({"data_parallel_replicate_degree": 2, "sharding_strategy": "HYBRID_SHARD"}, {"replicate": 2}),
        ({"ignored_modules": None, "load_monolith_rank0_only": True, "min_params": 1e9}, None),
    ],
)
def test_composers_words_for_fsdp(given: dict[str, object], ours: object) -> None:
    assert translate(FOREIGN | {"fsdp_config": given})[0].get("parallel") == ours


def test_all_mistakes_of_fsdp_come_in_one_round() -> None:
    wrong = {"process_group": "node", "sharding_strategy": "HYBRID_SHARD", "typo": 1, "device_mesh": "2x4",
             "mixed_precision": {"param_dtype": "fp16"}}  # fmt: skip
    with pytest.raises(ConfigError) as error:
        translate(FOREIGN | {"fsdp_config": wrong})
    found = [line.split(":")[0].removeprefix("fsdp_config.") for line in str(error.value).splitlines()]
    assert sorted(found) == sorted(
        ["mixed_precision.param_dtype", "process_group", "sharding_strategy", "typo", "device_mesh"]
    )
    with pytest.raises(ConfigError, match="computes in float32"):
        translate(FOREIGN | {"precision": "amp_bf16", "fsdp_config": {"mixed_precision": {"param_dtype": "fp32"}}})


def test_products_of_8_bits_have_their_name() -> None:
    data, _ = translate(FOREIGN | {"precision": "amp_fp8", "fsdp_config": {"mixed_precision": "PURE"}})
    assert data["precision"] == "amp_fp8"


@pytest.mark.parametrize(("key", "of", "other"), [("hidden_size", "d_model", 17), ("num_layers", "n_layers", 2)])
def test_what_a_mixture_repeats_of_the_model_must_be_equal(key: str, of: str, other: int) -> None:
    ffn = {"ffn_type": "mb_dmoe", "moe_num_experts": 2, "fc_kwargs": {}, "fc_cls": None, "device_mesh": [8]}
    data, _ = translate({"model": SIZES | {"ffn_config": ffn | {key: SIZES[of]}}} | FOREIGN)
    assert data["model"]["ffn_config"] == {"ffn_type": "mb_dmoe", "moe_num_experts": 2}
    with pytest.raises(ConfigError, match=f"{key}: {other} is not model.{of}={SIZES[of]}"):
        translate({"model": SIZES | {"ffn_config": ffn | {key: other}}} | FOREIGN)


@pytest.mark.parametrize("value", [None, False, {"attn_scale": 0.0, "floor_scale": 4}, {}])
def test_queries_scaled_by_position_are_refused_where_they_are_on(value: object) -> None:
    block = {"order": [{"name": "a"}], "overrides": {"a": {"attn_config": {"attn_temperature_tuning": value}}}}
    for keys in ({"attn_config": {"attn_temperature_tuning": value}}, {"block_overrides": block}):
        assert _translated(**keys) == _translated()
    block["overrides"]["a"]["attn_config"]["attn_temperature_tuning"] = {"attn_scale": 0.1}
    with pytest.raises(ConfigError, match=r"overrides.a.attn_config.attn_temperature_tuning: is not supported"):
        _translated(block_overrides=block)


@pytest.mark.parametrize("name", sorted(OTHER_MODELS))
def test_models_that_are_not_built_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name: {name}: .*not (trained|evaluated) here"):
        translate({"model": {"name": name}})
    with pytest.raises(ConfigError, match=r"models.0.model.name: .* not (trained|evaluated) here"):
        of_evaluation({"models": [{"model_name": "a", "model": {"name": name}}]})


def test_an_evaluation_in_fp16_is_one_in_the_precision_of_the_machine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert of_evaluation({"precision": "amp_fp16"}) == {"precision": "auto"}
    assert "amp_fp16 is now auto" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("pretrained_lora_id_or_path", "a/b", "merge_and_unload"), ("load_in_8bit", True, "precision")],
)
def test_what_an_evaluation_cannot_load_says_what_to_do(key: str, value: object, says: str) -> None:
    model = {"name": "hf_causal_lm", "pretrained_model_name_or_path": "a/b", key: value}
    with pytest.raises(ConfigError, match=rf"models.0.model.{key}: is not supported; .*{says}"):
        of_evaluation({"models": [{"model_name": "a", "model": model}]})


def test_an_evaluation_takes_the_keys_of_a_model_that_training_takes() -> None:
    model = {"name": "hf_causal_lm", "pretrained_model_name_or_path": "a/b", "init_device": "mixed", "use_logits": True,
             "shift_labels": True, "additional_eval_metrics": [], "allow_embedding_resizing": True}  # fmt: skip
    (found,) = of_evaluation({"models": [{"model_name": "a", "model": model}]})["models"]
    assert found == {"model_name": "a", "load_path": "hf:a/b"}


def test_tokens_of_rows_that_are_not_full_are_said() -> None:
    tree = FOREIGN | {"max_duration": "1e6tok", "train_loader": {"name": "finetuning", "dataset": {"hf_name": "a"}}}
    said = "max_duration='1e6tok': counts all tokens of rows, including padding"
    assert any(note.startswith(said) for note in translate(tree)[1])
    assert not any("tok" in note for note in translate(FOREIGN | {"max_duration": "1e6tok"})[1])


def test_what_pure_reduces_in_is_said() -> None:
    assert any("bfloat16" in note for note in translate({"fsdp_config": {"mixed_precision": "PURE"}})[1])
    assert "FULL" in translate({"precision": "fp32", "fsdp_config": {"mixed_precision": "FULL"}})[1][0]


@pytest.mark.parametrize("blank", [{}, {"save_folder": None}])
def test_without_a_save_folder_a_temporary_one_is_said(blank: dict[str, object]) -> None:
    data, notes = translate({"fsdp_config": None, **blank})
    assert str(data["save_folder"]) in notes[-1] and data["save_interval"] == "0ba"


def test_several_nodes_need_a_save_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="several nodes"):
        translate({"fsdp_config": None})


def test_a_file_in_our_own_words_is_left_alone() -> None:
    assert translate({"seed": 1}) == ({"seed": 1}, [])
    assert "save_folder" not in translate({"eval_interval": 1, "model": {"name": "causal_lm"}})[0], "it is a mistake"


def test_a_run_without_a_name_gets_one_where_a_path_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUN_NAME", raising=False)
    tree = {"fsdp_config": None, "run_name": None, "save_folder": "./{run_name}/checkpoints"}
    data, notes = translate(tree)
    assert any(str(data["run_name"]) in note for note in notes)
    monkeypatch.setenv("RUN_NAME", "named")
    assert translate(tree)[0]["run_name"] is None


def _translated(**keys: object) -> CausalLMConfig:
    model = check(ModelConfig, translate({"model": SIZES | keys})[0]["model"])
    assert isinstance(model, CausalLMConfig)
    return model


def test_dropout_scales_and_first_values_keep_their_words() -> None:
    keys = {
        "resid_pdrop": 0.1, "emb_pdrop": 0.2, "logit_scale": "inv_sqrt_d_model", "embedding_fraction": 0.1,
        "init_config": {"name": "xavier_uniform_", "init_gain": 1.0, "emb_init_uniform_lim": [-0.1, 0.1]},
    }  # fmt: skip
    model = _translated(**keys, attn_config={"attn_pdrop": 0.3, "clip_qkv": 0})
    assert (model.resid_pdrop, model.emb_pdrop, model.attn_config.dropout) == (0.1, 0.2, 0.3)
    assert (model.logits_factor, model.embedding_fraction) == (0.25, 0.1)
    assert model.init_config.emb_init_uniform_lim == [-0.1, 0.1] and model.attn_config.clip_qkv is None


@pytest.mark.parametrize(("theirs", "ours"), [("qk_gn", "qk_norm"), ("qk_ln", "qk_ln")])
def test_queries_and_keys_have_the_layernorm_that_they_have_there(theirs: str, ours: str) -> None:
    """Of a model with RMSNorm too: LLM Foundry passes no norm to its attention, whose default is a LayerNorm."""
    rms = {"norm_type": "low_precision_rmsnorm", "norm_eps": 1e-6}
    model = _translated(**rms, attn_config={theirs: True})
    assert getattr(model.attn_config, ours) and model.attn_config.head_norm(model.norm).norm_type == "layernorm"
    assert model.attn_config.head_norm(model.norm).eps == 1e-5 and model.norm.is_rms
    said = _translated(**rms, attn_config={theirs: True, "norm_type": "rmsnorm", "norm_eps": 1e-6})
    assert said.attn_config.head_norm(said.norm).is_rms
    assert _translated(attn_config={theirs: True}).attn_config.norm_type is None
    assert _translated(**rms, attn_config={"qk_gn": False}).attn_config.norm_type is None
    own = check(
        ModelConfig,
        translate({"model": SIZES | rms | {"name": "causal_lm", "attn_config": {"qk_ln": True}}})[0]["model"],
    )
    assert own.attn_config.norm_type is None, "a file in our words means what it says"


def test_heads_of_another_size_keep_the_scale_of_theirs() -> None:
    model = _translated(head_dim=8)
    assert (model.attn_config.head_dim, model.attn_config.softmax_scale) == (8, 0.5)  # d_model / n_heads is 4
    for keys in ({"head_dim": 4}, {"head_dim": None}, {"attn_config": {"kv_dim": 16}}):
        assert _translated(**keys).attn_config.softmax_scale is None
    assert _translated(head_dim=8, attn_config={"softmax_scale": 0.1}).attn_config.softmax_scale == 0.1


CHARACTER = """
order:
- name: default
- repeat: 2
  order:
  - name: near
  - name: near_reuse
  - name: near
  - repeat: 2
    name: near_reuse
  - name: reuse
overrides:
  near: {attn_config: {sliding_window_size: 1024}}
  near_reuse: {attn_config: {sliding_window_size: 1024, reuse_kv_layer_idx: -1}}
  reuse: {attn_config: {reuse_kv_layer_idx: -6}}
"""  # the example of LLM Foundry's documentation, with shorter names


def test_overrides_of_blocks_become_patterns_of_layers() -> None:
    keys = {"n_layers": 13, "attn_config": {"rope": True}, "block_overrides": yaml.safe_load(CHARACTER)}
    model = _translated(**keys)
    near = [1024] * 5 + [-1]
    assert [model.window(layer) for layer in range(13)] == [-1, *near, *near]
    # There -6 leads from layer 6 to layer 0, and from layer 12 to layer 6, which has none of its own: to layer 0.
    expected = [None, None, 1, None, 3, 3, 0, None, 7, None, 9, 9, 0]
    assert [model.kv_source(layer) for layer in range(13)] == expected
    again = check(ModelConfig, translate({"model": dump(model)})[0]["model"])
    assert again == model, "what a run writes out can be read again"


def test_layers_without_positions_and_with_another_window_than_the_model() -> None:
    overrides = {"far": {"attn_config": {"sliding_window_size": -1, "nope": True}}}
    order = {"order": [{"name": "default", "repeat": 3}, {"name": "far"}], "repeat": 2, "overrides": overrides}
    attention = {"rope": True, "sliding_window_size": 7}
    model = _translated(n_layers=8, attn_config=attention, block_overrides=order)
    assert [model.window(layer) for layer in range(8)] == [7, 7, 7, -1] * 2
    assert [model.encodes_positions(layer) for layer in range(8)] == [True, True, True, False] * 2
    assert model.attn_reuse_kv_pattern is None
    plain = _translated(n_layers=2, block_overrides={"order": [{"name": "default", "repeat": 2}], "overrides": {}})
    assert plain == _translated(n_layers=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"order": [{"name": "default"}]}, "give 1 layers, n_layers is 2"),
        ({"order": [{"name": "lost", "repeat": 2}]}, "'lost' is not in overrides; it holds a"),
        ({"order": [{"name": "a", "order": []}]}, "either a name or an order"),
        ({"order": [{"name": "a", "repeat": 0}]}, "repeat: must be a whole number"),
        ({"overrides": {"default": {}}}, "`default` is the layer without any"),
        ({"overrides": {"a": {"ffn_config": {}}}}, "only attn_config can differ"),
        ({"overrides": {"a": {"attn_config": {"reuse_kv_x_layer_idx": -1}}}}, "reuse_kv_x_layer_idx: is not supported"),
        ({"overrides": {"a": {"attn_config": {"reuse_kv_layer_idx": 0}}}}, "must be negative"),
        ({"more": 1}, "block_overrides.more: unknown key"),
    ],
)
def test_overrides_that_cannot_be_are_refused(change: dict[str, object], says: str) -> None:
    good = {"order": [{"name": "default"}, {"name": "a"}], "overrides": {"a": {"attn_config": {"nope": True}}}}
    keys = SIZES | {"n_layers": 2, "attn_config": {"rope": True}}
    check(ModelConfig, translate({"model": keys | {"block_overrides": good}})[0]["model"])
    with pytest.raises(ConfigError, match=says):
        translate({"model": keys | {"block_overrides": good | change}})


def test_each_rope_reads_its_own_config_alone() -> None:
    linear = {"rope": True, "rope_hf_config": {"type": "linear", "factor": 2.0}}
    assert _translated(attn_config=linear | {"rope_impl": "hf"}).attn_config.rope_scaling.type == "linear"
    assert _translated(attn_config=linear | {"rope_impl": "dail"}).attn_config.rope_scaling.type == "none"
    assert _translated(attn_config=linear).attn_config.rope_scaling.type == "none", "dail is the default there"
    xpos = {"rope": True, "rope_dail_config": {"type": "xpos", "xpos_scale_base": 512}}
    with pytest.raises(ConfigError, match="rope_dail_config.type: 'xpos' is not supported"):
        _translated(attn_config=xpos | {"rope_impl": "dail"})
    assert _translated(attn_config=xpos | {"rope_impl": "hf"}).attn_config.rope
