"""convert.py from-composer: LLM Foundry's weights in every layout are ours, exactly, and nothing in a file runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from composer_fixtures import (
    BASE,
    EXPERTS,
    MODELS,
    TOKENS,
    build,
    composer_state,
    foundry_config,
    logits,
    theirs,
    tokenizer_files,
    write_sharded,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmfoundry.checkpoint.reading import load_model_only, read
from llmfoundry.cli.convert import convert_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import check
from llmfoundry.hf.tokenizer import tokenizer_of
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLM
from tests import forks


def converted(folder: Path) -> CausalLM:
    """The model in a checkpoint of ours."""
    contents = read(folder)
    model = check(ModelConfig, contents.config["model"]).build()
    assert isinstance(model, CausalLM)
    load_model_only(contents, model)
    return model.eval()


def write_yaml(path: Path, model: dict[str, object]) -> str:
    path.write_text(yaml.safe_dump({"max_seq_len": 16, "model": model, "max_duration": "1ba"}))
    return str(path)


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_source(kind: str, sharded: bool, tmp_path: Path) -> None:
    source = build(MODELS[kind])
    state = composer_state(theirs(source, kind != "moe", kind != "unfused", kind == "wrapped"))
    path = tmp_path / "ep0-ba2"
    if sharded:
        write_sharded(path, state)
    else:
        torch.save(state, path)
    config = write_yaml(tmp_path / "their.yaml", MODELS[kind])
    assert convert_main(["from-composer", str(path), str(tmp_path / "out"), "--config", config]) == 0
    assert torch.equal(logits(converted(tmp_path / "out")), logits(source))


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("kind", ["dense", "dmoe"])
def test_stored_config_and_tokenizer_are_enough(kind: str, sharded: bool, tmp_path: Path) -> None:
    source = build(MODELS[kind])
    stored = {
        "huggingface": {
            "model": {"config": {"file_extension": ".json", "content": foundry_config(MODELS[kind])}},
            "tokenizer": tokenizer_files(tmp_path / "tokenizer"),
        }
    }
    state = composer_state(theirs(source), stored)
    path = tmp_path / "checkpoint"
    if sharded:
        write_sharded(path, state)
    else:
        torch.save(state, path)
    assert convert_main(["from-composer", str(path), str(tmp_path / "out")]) == 0
    assert torch.equal(logits(converted(tmp_path / "out")), logits(source))
    folder = read(tmp_path / "out").tokenizer
    assert folder is not None
    tokenizer = tokenizer_of(folder)
    assert tokenizer is not None and tokenizer.eos_token_id == 0 and tokenizer.encode("!") == [1]


def test_a_model_of_transformers_inside_composer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    source = LlamaForCausalLM(config).eval()
    weights = {f"model.{name}": value for name, value in source.state_dict().items()}
    stored = {"huggingface": {"model": {"config": {"content": config.to_dict()}}, "tokenizer": {}}}
    torch.save(composer_state(weights, stored), tmp_path / "llama.pt")
    assert convert_main(["from-composer", str(tmp_path / "llama.pt"), str(tmp_path / "out")]) == 0
    with torch.no_grad():
        expected = source(TOKENS).logits
    assert torch.allclose(logits(converted(tmp_path / "out")), expected, atol=1e-5)  # other order of float32 sums


def test_queries_keys_and_values_may_be_apart(tmp_path: Path) -> None:
    source = build(MODELS["glu"])  # of 16, 8 and 8 rows
    weights = theirs(source)
    for name in [name for name in weights if "Wqkv" in name]:
        parts = weights.pop(name).split([16, 8, 8])
        weights |= {
            name.replace("Wqkv", each): part.clone() for each, part in zip(("Wq", "Wk", "Wv"), parts, strict=True)
        }
    torch.save(composer_state(weights), tmp_path / "a.pt")
    config = write_yaml(tmp_path / "their.yaml", MODELS["glu"])
    assert convert_main(["from-composer", str(tmp_path / "a.pt"), str(tmp_path / "out"), "--config", config]) == 0
    assert torch.equal(logits(converted(tmp_path / "out")), logits(source))


@pytest.mark.parametrize("norm", [{"norm_type": "rmsnorm"}, {"norm_eps": 1e-6}], ids=["rmsnorm", "eps"])
def test_norms_of_queries_that_are_others_there_are_refused(
    norm: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A YAML in our own words, in which these norms are as the model's; in theirs they are a LayerNorm."""
    model = {**MODELS["glu"], **norm, "name": "causal_lm"}
    torch.save(composer_state(theirs(build(model))), tmp_path / "a.pt")
    config = write_yaml(tmp_path / "their.yaml", model)
    assert convert_main(["from-composer", str(tmp_path / "a.pt"), str(tmp_path / "out"), "--config", config]) == 2
    assert "LLM Foundry normalises queries and keys by a LayerNorm of eps 1e-5" in capsys.readouterr().err


def test_names_of_wrappers_and_buffers_are_no_obstacle(tmp_path: Path) -> None:
    source = build(BASE)
    weights = {
        name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for name, value in theirs(source).items()
    }
    weights["model.transformer.blocks.0.attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(composer_state(weights), tmp_path / "a.pt")
    config = write_yaml(tmp_path / "their.yaml", BASE)
    assert convert_main(["from-composer", str(tmp_path / "a.pt"), str(tmp_path / "out"), "--config", config]) == 0
    assert torch.equal(logits(converted(tmp_path / "out")), logits(source))


class Payload:
    """Unpickled by `pickle`, it runs a command that leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


def planted_in_file(folder: Path, payload: Payload) -> Path:
    state = composer_state(theirs(build(BASE)))
    state["extra"] = payload
    torch.save(state, folder / "a.pt")
    return folder / "a.pt"


def planted_in_metadata(folder: Path, payload: Payload) -> Path:
    made = write_sharded(folder / "made", composer_state(theirs(build(BASE))))
    about = pickle.loads((made / ".metadata").read_bytes())
    about.planner_data["extra"] = payload
    (made / ".metadata").write_bytes(pickle.dumps(about))
    return made


def planted_in_place_of_metadata(folder: Path, payload: Payload) -> Path:
    made = write_sharded(folder / "made", composer_state(theirs(build(BASE))))
    (made / ".metadata").write_bytes(pickle.dumps(payload))
    return made


def planted_in_an_item(folder: Path, payload: Payload) -> Path:
    state = composer_state(theirs(build(BASE)))
    inner = state["state"]
    assert isinstance(inner, dict)
    inner["integrations"] = {"huggingface": {"model": {"config": {"content": payload}}}}
    return write_sharded(folder / "made", state)


PLANTED = [planted_in_file, planted_in_metadata, planted_in_place_of_metadata, planted_in_an_item]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_command_does_not_run(plant: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(plant)
    ran = tmp_path / "ran"
    source = plant(tmp_path, Payload(ran))
    assert convert_main(["from-composer", str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "posix.system" in error and error.startswith("error: ")
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_the_payload_would_run_where_pickle_is_believed(tmp_path: Path) -> None:
    torch.load(planted_in_file(tmp_path, Payload(tmp_path / "ran")), weights_only=False)
    assert (tmp_path / "ran").exists()


def _truncated(folder: Path) -> Path:
    torch.save(composer_state(theirs(build(BASE))), folder / "a.pt")
    content = (folder / "a.pt").read_bytes()
    (folder / "a.pt").write_bytes(content[: len(content) // 2])
    return folder / "a.pt"


def _plain_weights(folder: Path) -> Path:
    torch.save(theirs(build(BASE)), folder / "a.pt")
    return folder / "a.pt"


def _short_shard(folder: Path) -> Path:
    made = write_sharded(folder / "made", composer_state(theirs(build(BASE))))
    shard = next(made.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:3000])
    return made


def _parent_of_a_folder(folder: Path) -> Path:
    write_sharded(folder / "saved" / "ep0-ba2", composer_state(theirs(build(BASE))))
    return folder / "saved"


def _outside(folder: Path) -> Path:
    made = write_sharded(folder / "made", composer_state(theirs(build(BASE))))
    about = pickle.loads((made / ".metadata").read_bytes())
    assert isinstance(about, Metadata)
    for where in about.storage_data.values():
        where.relative_path = f"../made/{where.relative_path}"
    (made / ".metadata").write_bytes(pickle.dumps(about))
    return made


def _without_a_part(folder: Path) -> Path:
    made = write_sharded(folder / "made", composer_state(theirs(build(BASE))))
    about = pickle.loads((made / ".metadata").read_bytes())
    assert isinstance(about, Metadata)
    about.state_dict_metadata["state.model.model.transformer.wte.weight"].chunks.clear()
    (made / ".metadata").write_bytes(pickle.dumps(about))
    return made


def _not_of_torch(folder: Path) -> Path:
    (folder / "a.pt").write_bytes(pickle.dumps(Payload(folder / "ran")))
    return folder / "a.pt"


def _other_dtype(folder: Path) -> Path:
    weights = {name: value.to(torch.int8) for name, value in theirs(build(BASE)).items()}
    torch.save(composer_state(weights), folder / "a.pt")
    return folder / "a.pt"


MISTAKES = [
    (_truncated, "is damaged"),
    (_plain_weights, "has no state.model"),
    (_short_shard, "ends before byte"),
    (_parent_of_a_folder, "name one of ep0-ba2 in it"),
    (_outside, "is outside of the folder"),
    (_without_a_part, "are not all of it"),
    (_not_of_torch, "not an uncompressed file of torch.save"),
    (_other_dtype, "has dtype torch.int8"),
    (lambda folder: folder / "nowhere.pt", "nowhere.pt: no such file or folder"),
    (lambda folder: folder, "is neither a FILE.pt nor a sharded Composer folder"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_one_line(make: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(make)
    config = write_yaml(tmp_path / "their.yaml", BASE)
    source = make(tmp_path)
    assert convert_main(["from-composer", str(source), str(tmp_path / "out"), "--config", config]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("error: ")
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


CONFIGS: list[tuple[dict[str, object] | None, str]] = [
    (None, "stores no config of its model; name the YAML that trained it: --config YAML"),
    ({**BASE, "d_model": 32}, "has shape [50, 16], but the model's config makes it [50, 32]"),
    ({**BASE, "n_layers": 3}, "'transformer.blocks.2.norm_1.weight' is missing"),
    ({**BASE, "n_layers": 1}, "'transformer.blocks.1.attn.Wqkv.bias' has no place"),
    (MODELS["dmoe"], "ffn.router.layer.weight' is missing"),
    (
        {
            **BASE,
            "name": "causal_lm",
            "attn_config": {
                "attn_type": "multihead_latent_attention",
                "kv_lora_rank": 8,
                "qk_nope_head_dim": 4,
                "qk_rope_head_dim": 4,
                "v_head_dim": 8,
            },
        },
        "LLM Foundry has no multihead_latent_attention",
    ),
    (
        {
            **MODELS["dmoe_glu"],
            "ffn_config": {"ffn_type": "moe", "shared_expert": True, "shared_expert_gate": True, **EXPERTS},
        },
        "no tensor there is 'blocks.0.ffn.shared_expert_gate.weight'",
    ),
    ({**BASE, "use_pad_tok_in_ffn": False}, "model.use_pad_tok_in_ffn: False is not supported"),
]


@pytest.mark.parametrize(("model", "message"), CONFIGS, ids=[message for _, message in CONFIGS])
def test_another_config_is_refused(
    model: dict[str, object] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(composer_state(theirs(build(BASE))), tmp_path / "a.pt")
    config = [] if model is None else ["--config", write_yaml(tmp_path / "their.yaml", model)]
    assert convert_main(["from-composer", str(tmp_path / "a.pt"), str(tmp_path / "out"), *config]) == 2
    assert message in capsys.readouterr().err


def run_from(folder: Path, model: dict[str, object], load_path: Path) -> list[str]:
    """A run of one step that moves nothing, as arguments of train.py."""
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("the cat sat on a mat and the dog lay on a log " * 20)
    data = {
        "max_seq_len": 16, "model": model, "tokenizer": {"name": "bpe", "vocab_size": 300},
        "train_loader": {"dataset": {"name": "text_files", "path": str(folder / "texts")}},
        "optimizer": {"name": "adamw", "lr": 1e-30, "weight_decay": 0.0}, "scheduler": {"name": "constant_with_warmup"},
        "max_duration": "1ba", "global_train_batch_size": 2, "save_folder": str(folder / "run"),
        "load_path": str(load_path), "log_to_console": False,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(data))
    return [str(folder / "run.yaml")]


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "folder"])
def test_a_run_begins_from_their_weights(sharded: bool, tmp_path: Path) -> None:
    model = {**MODELS["dmoe_glu"], "vocab_size": 320}
    source = build(model)
    path = tmp_path / ("ep0-ba2" if sharded else "ep0-ba2-rank0.pt")
    if sharded:
        write_sharded(path, composer_state(theirs(source)))
    else:
        torch.save(composer_state(theirs(source)), path)
    assert train_main([*run_from(tmp_path, model, path), "load_weights_only=true"]) == 0
    trained = converted(tmp_path / "run")
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in source.state_dict().items())


REFUSED = [
    ([], "only the weights of a Composer checkpoint can be loaded"),
    (["load_weights_only=true", "model.n_layers=1"], "has no place in a model of this config"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_run_that_cannot_begin_there_is_refused(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {**BASE, "vocab_size": 320}
    torch.save(composer_state(theirs(build(model))), tmp_path / "a.pt")
    assert train_main([*run_from(tmp_path, model, tmp_path / "a.pt"), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _save_on_two_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    weights: dict[str, Tensor] = {
        name: distribute_tensor(value, mesh, [Shard(0)]) if value.dim() else value
        for name, value in theirs(build(MODELS["dmoe_glu"])).items()
    }
    dcp.save(composer_state(weights), storage_writer=dcp.FileSystemWriter(folder / "ep0-ba2"))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.dist
def test_parts_of_two_ranks_make_one_model(tmp_path: Path) -> None:
    forks.in_processes(_save_on_two_ranks, (tmp_path,), 2)
    source = tmp_path / "ep0-ba2"
    assert len(list(source.glob("*.distcp"))) == 2
    config = write_yaml(tmp_path / "their.yaml", MODELS["dmoe_glu"])
    assert convert_main(["from-composer", str(source), str(tmp_path / "out"), "--config", config]) == 0
    assert torch.equal(logits(converted(tmp_path / "out")), logits(build(MODELS["dmoe_glu"])))
