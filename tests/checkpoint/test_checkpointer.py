import copy
import itertools
import json
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from earlier_format import to_earlier_format
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

import llmfoundry.train.lion
import llmfoundry.train.muon  # noqa: F401  both register their optimizers
from llmfoundry.checkpoint import manifest
from llmfoundry.checkpoint.checkpointer import Checkpointer, CheckpointState, SaveError, load_model_only, read
from llmfoundry.checkpoint.finding import candidates
from llmfoundry.checkpoint.manifest import MANIFEST, CheckpointError, verify
from llmfoundry.config import ConfigError, check
from llmfoundry.kernels.halves import LOW_HALF, joined, weight_of
from llmfoundry.parallel.apply import keep_weights_in
from llmfoundry.train.adamw import moment
from llmfoundry.train.optim import AdamWConfig, OptimizerConfig
from tests import forks
from tests.full_disk import full_disk

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


Kept = Literal["fp32", "bf16", "int8"]
SPLITTING = ("adamw", "decoupled_lionw", "muon")  # optimizers that keep weights in halves


class Tiny(nn.Module):
    """A matrix that two ranks split unevenly, one that leaves a rank nothing, experts, and a buffer."""

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(width, 7)
        self.head = nn.Linear(7, 1)
        self.w1 = nn.Parameter(torch.randn(2, 3, width))
        self.register_buffer("expert_bias", torch.randn(2))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)


def build(
    seed: int = 0, width: int = 4, state_dtype: Kept = "fp32", half: bool = False, split: bool = False
) -> tuple[nn.Module, Optimizer]:
    """A model and its optimizer; `half`: weights in bfloat16, gradients in float32; `split`: weights in two halves."""
    model = Tiny(seed, width)
    if half or split:
        keep_weights_in(torch.bfloat16, model)
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
    weights = "fp32_split" if split else "bf16_sr" if half else "fp32"
    return model, AdamWConfig(lr=0.01, state_dtype=state_dtype, master_weights=weights).build(model)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3, seed: int = 7) -> None:
    """Steps with gradients that depend on the seed and the parameter's name order alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad
        optimizer.step()


def state(model: nn.Module, optimizer: Optimizer | None = None, step: int = 3) -> CheckpointState:
    return CheckpointState(step=step, model=model, optimizer=optimizer, trainer={"rows": 24}, config={"seed": 17})


def newest(checkpointer: Checkpointer) -> Path | None:
    found = checkpointer.newest()
    return found.path if found is not None else None


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(a: tuple[nn.Module, Optimizer], b: tuple[nn.Module, Optimizer]) -> None:
    """Weights, buffers and the optimizer's memory are the same bits."""
    other = dict(b[0].state_dict())
    for name, tensor in a[0].state_dict().items():
        assert torch.equal(full(tensor), full(other[name])), name
    for (name, p), q in zip(a[0].named_parameters(), b[0].parameters(), strict=True):
        assert a[1].state[p].keys() == b[1].state[q].keys()
        for key, value in a[1].state[p].items():
            assert torch.equal(full(value), full(b[1].state[q][key])), f"{name} {key}"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, tuple[nn.Module, Optimizer]]:
    """A folder with step-1 and step-2, and the run that wrote them."""
    run = build()
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    for step in (1, 2):
        train(*run, steps=1)
        checkpointer.save(state(*run, step=step))
    return tmp_path / "checkpoints", run


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kept", ["bf16", "int8"])
def test_smaller_moments_and_weights_are_kept_so_and_training_continues_the_same(
    tmp_path: Path, kept: Kept, half: bool
) -> None:
    run, other = (build(seed=seed, state_dtype=kept, half=half) for seed in (0, 1))
    train(*run)
    Checkpointer(tmp_path).load(Checkpointer(tmp_path).save(state(*run)), state(*other))
    dtypes = {memory["exp_avg_sq"].dtype for memory in other[1].state.values()}
    assert dtypes == ({torch.bfloat16} if kept == "bf16" else {torch.uint8, torch.float32}), "biases have no codes"
    assert_same(run, other)
    train(*run, seed=8)
    train(*other, seed=8)
    assert_same(run, other)


@pytest.mark.parametrize(
    ("before", "after"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp32", "int8"), ("int8", "fp32"), ("int8", "bf16")]
)
def test_moments_of_another_dtype_are_taken_over(
    tmp_path: Path, before: Kept, after: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run, other = build(state_dtype=before), build(seed=1, state_dtype=after)
    train(*run)
    Checkpointer(tmp_path).load(Checkpointer(tmp_path).save(state(*run)), state(*other))
    for (name, p), q in zip(run[0].named_parameters(), other[0].parameters(), strict=True):
        q.grad = torch.zeros_like(q)
        old, new = run[1].state[p]["exp_avg_sq"].clone(), other[1].state[q]["exp_avg_sq"]
        assert torch.equal(old, new), name
    other[1].step()
    for p, q in zip(run[0].parameters(), other[0].parameters(), strict=True):  # gradients of zero leave beta2 of it
        old, new = (moment(each[1].state[which], "exp_avg_sq").float() for each, which in ((run, p), (other, q)))
        has_codes = "exp_avg_sq_scale" in other[1].state[q]
        assert has_codes == (after == "int8" and q.ndim > 1)
        # The largest codes of a block are 1.6 % of its largest value apart, and rounding happens twice.
        torch.testing.assert_close(new, 0.95 * old, rtol=2**-6, atol=float(old.max()) / 31 if has_codes else 0)
    assert len([line for line in caplog.messages if "state_dtype" in line]) == 1


@pytest.mark.parametrize("half", [False, True])
def test_weights_of_another_dtype_are_taken_over(tmp_path: Path, half: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run, other, alone = build(half=half), build(seed=1, half=not half), Tiny(2)
    train(*run)
    path = Checkpointer(tmp_path).save(state(*run))
    Checkpointer(tmp_path).load(path, state(*other))
    load_model_only(path, alone)
    for p, q, r in zip(run[0].parameters(), other[0].parameters(), alone.parameters(), strict=True):
        assert q.dtype == (torch.float32 if half else torch.bfloat16) and r.dtype == torch.float32
        assert torch.equal(q, p.to(q.dtype)) and torch.equal(r, p.float())
        assert torch.equal(run[1].state[p]["exp_avg"], other[1].state[q]["exp_avg"])
    assert len([line for line in caplog.messages if "optimizer.master_weights" in line]) == 1
    train(*other)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_weights_in_halves_are_float32_in_a_checkpoint_and_nowhere_else(
    tmp_path: Path, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run, other, alike = build(split=True), build(seed=1), build(seed=2, split=True)
    train(*run)
    exact = {name: joined(p.detach(), run[1].state[p][LOW_HALF]) for name, p in run[0].named_parameters()}
    checkpointer = Checkpointer(tmp_path, asynchronous=asynchronous)
    checkpointer.save(state(*run))
    path = checkpointer.wait() if asynchronous else newest(checkpointer)
    assert path is not None
    kept = load_file(Path(path) / "model-00000.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in exact.items())
    assert not any(LOW_HALF in name for name in load_file(Path(path) / "optimizer-00000.safetensors"))
    Checkpointer(tmp_path).load(path, state(*other))
    Checkpointer(tmp_path).load(path, state(*alike))
    assert all(torch.equal(p, exact[name]) and p.dtype == torch.float32 for name, p in other[0].named_parameters())
    assert_same(run, alike)
    train(*run, seed=8)
    train(*alike, seed=8)
    assert_same(run, alike)
    assert not any("master_weights" in line for line in caplog.messages)
    assert any(joined(p.detach(), run[1].state[p][LOW_HALF]).ne(p.float()).any() for p in run[0].parameters())


def test_a_weight_may_get_its_low_half_after_a_save_and_a_frozen_one_that_is_rounded_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run, other = build(split=True), build(seed=1, split=True)
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(state(*run, step=0))  # weights alone, in bfloat16
    train(*run)
    checkpointer.save(state(*run))
    path = checkpointer.wait()
    assert path is not None
    Checkpointer(tmp_path).load(path, state(*other))
    assert_same(run, other)
    assert not any("master_weights" in line for line in caplog.messages)
    train(*run)
    checkpointer.save(state(*run, step=6))
    path = checkpointer.wait()
    assert path is not None
    other[0].get_parameter("head.weight").requires_grad_(False)  # has no low half now
    Checkpointer(tmp_path).load(path, state(*other))
    assert any("float32 in the checkpoint and are kept in torch.bfloat16" in line for line in caplog.messages)
    assert torch.equal(run[0].get_parameter("head.weight"), other[0].get_parameter("head.weight"))


def test_a_checkpoint_brings_everything_back_bitwise_and_training_continues_the_same(tmp_path: Path) -> None:
    run, other = build(seed=0), build(seed=1)
    train(*run)
    path = Checkpointer(tmp_path).save(state(*run))
    before = torch.rand(3)
    loaded = Checkpointer(tmp_path).load(path, state(*other))
    assert (loaded["step"], loaded["rows"]) == (3, 24)
    assert torch.equal(torch.rand(3), before)  # the random state came back
    assert_same(run, other)
    train(*run, seed=8)
    train(*other, seed=8)
    assert_same(run, other)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_a_checkpoint_of_the_earlier_format_brings_everything_back(tmp_path: Path, ranks: int, kept: Kept) -> None:
    run, other, weights = (build(seed, state_dtype=kept) for seed in range(3))
    train(*run)
    path = Checkpointer(tmp_path).save(state(*run))
    before = torch.rand(3)
    to_earlier_format(Path(path), ranks)
    found = Checkpointer(tmp_path).newest()
    assert found is not None and "layouts" not in json.loads((found.path / "tensors.json").read_text())
    assert Checkpointer(tmp_path).load(found, state(*other))["rows"] == 24
    assert torch.equal(torch.rand(3), before)  # the random state came back
    assert_same(run, other)
    load_model_only(tmp_path, weights[0])
    assert all(torch.equal(a, b) for a, b in zip(run[0].parameters(), weights[0].parameters(), strict=True))
    train(*other, steps=1)
    Checkpointer(tmp_path).save(state(*other, step=4))  # beside it, as it is written now
    assert newest(Checkpointer(tmp_path)) == tmp_path / "step-4"


def test_loading_replaces_what_the_optimizer_remembered(tmp_path: Path) -> None:
    run, other = build(), build()
    path = Checkpointer(tmp_path).save(state(*run, step=0))  # before the first step: nothing to remember
    train(*other)
    Checkpointer(tmp_path).load(path, state(*other))
    assert not other[1].state
    assert_same(run, other)


def test_step_counts_are_where_the_optimizer_wants_them(tmp_path: Path) -> None:
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    train(model, optimizer)
    path = Checkpointer(tmp_path).save(state(model, optimizer))
    Checkpointer(tmp_path).load(path, state(model, optimizer))
    assert {memory["step"].item() for memory in optimizer.state.values()} == {3.0}
    train(model, optimizer)


def test_a_checkpoint_says_all_that_generation_needs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")  # here: the processes of the last test need not wait for it
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "<eot>": 1}, "a")), eos_token="<eot>"
    )
    folder = tmp_path / "run" / "checkpoints"
    config = {"model": {"name": "causal_lm", "d_model": 4}, "optimizer": {"lr": 3.0e-4}}
    path = Checkpointer(folder).save(CheckpointState(step=5, model=Tiny(), config=config, tokenizer=words))
    contents = read(tmp_path / "run")
    assert (contents.path, contents.step, contents.config) == (path, 5, config)
    assert contents.tokenizer is not None
    again = transformers.AutoTokenizer.from_pretrained(contents.tokenizer, local_files_only=True)
    assert (again.eos_token_id, len(again)) == (1, 2)
    listed = verify(path).files
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert on_disk == {MANIFEST, *listed}


def test_the_tensor_files_are_plain_safetensors(saved: tuple[Path, tuple[nn.Module, Optimizer]]) -> None:
    folder, (model, _) = saved
    weights = load_file(folder / "step-2" / "model-00000.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    by_dcp = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    dcp.load(by_dcp, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "step-2")), no_dist=True)
    assert all(torch.equal(by_dcp[name], tensor) for name, tensor in model.state_dict().items())


def test_a_folder_that_exists_is_never_written_to(saved: tuple[Path, tuple[nn.Module, Optimizer]]) -> None:
    folder, run = saved
    before = {path: path.read_bytes() for path in (folder / "step-2").rglob("*")}
    train(*run)
    checkpointer = Checkpointer(folder)
    assert [checkpointer.save(state(*run, step=2)).name for _ in range(2)] == ["step-2-r1", "step-2-r2"]
    assert {path: path.read_bytes() for path in (folder / "step-2").rglob("*")} == before
    assert newest(checkpointer) == folder / "step-2-r2"
    assert (folder / "latest").resolve().name == "step-2-r2"


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/latest", "checkpoints/step-2"])
def test_a_path_may_name_the_run_the_folder_or_the_checkpoint(
    saved: tuple[Path, tuple[nn.Module, Optimizer]], where: str
) -> None:
    folder, _ = saved
    assert Path(candidates(folder.parent / where)[0].place).name == "step-2"


def test_a_path_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: no checkpoint in this folder"):
        candidates(tmp_path)
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        candidates(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"but a Hugging Face model; write hf:{tmp_path}"):
        candidates(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: is a file; name a run's folder"):
        candidates(tmp_path / "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="but adapters in peft's format; name the run"):
        candidates(tmp_path)
    assert newest(Checkpointer(tmp_path / "nowhere")) is None
    assert not (tmp_path / "nowhere").exists()


# Damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def replace_by_link(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink, replace_by_link], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["model-00000.safetensors", "optimizer-00000.safetensors", "tensors.json",
                                  "trainer.json", "config.yaml"])  # fmt: skip
def test_a_damaged_file_is_named_and_the_older_checkpoint_is_used(
    saved: tuple[Path, tuple[nn.Module, Optimizer]],
    name: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, (model, optimizer) = saved
    damage(folder / "step-2" / name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f"step-2/{name}: "):
        Checkpointer(folder).load(folder / "step-2", state(model, optimizer))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert newest(Checkpointer(folder)) == folder / "step-1"
    assert f"step-2/{name}" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "files": {"a": 3}}',
                                  '{"format": 2, "files": {}}', '{"format": 1, "files": {}}'])  # fmt: skip
def test_a_manifest_that_is_none_is_an_error(saved: tuple[Path, tuple[nn.Module, Optimizer]], text: str) -> None:
    folder, _ = saved
    (folder / "step-2" / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"step-2/{MANIFEST}: ") as caught:
        verify(folder / "step-2")
    assert "\n" not in str(caught.value)
    (folder / "step-2" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        verify(folder / "step-2")
    assert newest(Checkpointer(folder)) == folder / "step-1"


def test_a_flipped_bit_of_a_manifest_is_harmless_or_found(
    saved: tuple[Path, tuple[nn.Module, Optimizer]],
) -> None:
    folder, (model, _) = saved
    whole = (folder / "step-2" / MANIFEST).read_bytes()
    sound = verify(folder / "step-2")
    for position in range(0, len(whole), 5):
        (folder / "step-2" / MANIFEST).write_bytes(
            whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :]
        )
        try:
            found = manifest.read_manifest(folder / "step-2")
            # Without the word that values were looked at, they are looked at again.
            assert found in (sound, sound._replace(finite=False))
        except (CheckpointError, AssertionError):
            with pytest.raises(CheckpointError):
                verify(folder / "step-2")


def test_only_damaged_checkpoints_are_an_error_and_none_is_not(
    saved: tuple[Path, tuple[nn.Module, Optimizer]],
) -> None:
    folder, _ = saved
    for step in (1, 2):
        flip(folder / f"step-{step}" / "model-00000.safetensors")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints can be used; .*step-2/model-00000"):
        Checkpointer(folder).newest()


def test_weights_alone_load_without_the_optimizers_files(
    saved: tuple[Path, tuple[nn.Module, Optimizer]],
) -> None:
    folder, (model, _) = saved
    (folder / "step-2" / "optimizer-00000.safetensors").unlink()
    other = Tiny(seed=3).to(torch.bfloat16)
    load_model_only(folder, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.to(torch.bfloat16)), name


# Another model


def wider(model: Tiny) -> str:
    model.linear = nn.Linear(6, 7)
    return "linear.weight is 7x4 float32 there and 7x6 float32 in this one"


def another_type(model: Tiny) -> str:
    model.head.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return "head.bias is 1 float32 there and 1 float64 in this one"


def deeper(model: Tiny) -> str:
    model.block = nn.Linear(2, 3, bias=False)
    return "it has no block.weight, which is 3x2 float32 in this one"


def shallower(model: Tiny) -> str:
    del model.head
    return "it has head.weight, 1x7 float32, which this one lacks"


@pytest.mark.parametrize("change", [wider, another_type, deeper, shallower], ids=lambda f: f.__name__)
def test_a_checkpoint_of_another_model_names_the_first_difference(
    saved: tuple[Path, tuple[nn.Module, Optimizer]], change: Callable[[nn.Module], str]
) -> None:
    folder, _ = saved
    model = Tiny(seed=5)
    message = change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f"step-2: it is of another model: {message}$"):
        Checkpointer(folder).load(folder / "step-2", state(model, AdamWConfig(lr=0.1).build(model)))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_state_of_a_parameter_that_is_not_trained_now_is_an_error(
    saved: tuple[Path, tuple[nn.Module, Optimizer]],
) -> None:
    folder, _ = saved
    model = Tiny()
    model.head.requires_grad_(False)
    with pytest.raises(CheckpointError, match="optimizer state of head.weight, which this run does not train"):
        Checkpointer(folder).load(folder / "step-2", state(model, AdamWConfig(lr=0.1).build(model)))


# Failed saves


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_fails_the_save_and_nothing_else(
    saved: tuple[Path, tuple[nn.Module, Optimizer]], asynchronous: bool
) -> None:
    folder, run = saved
    checkpointer = Checkpointer(folder, asynchronous=asynchronous)
    with full_disk(1000), pytest.raises(SaveError, match="step 9 could not be saved to .*File too large"):
        checkpointer.save(state(*run, step=9))
        checkpointer.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-1", "step-2"]
    assert newest(checkpointer) == folder / "step-2"
    checkpointer.save(state(*run, step=9))
    checkpointer.wait()
    assert newest(checkpointer) == folder / "step-9"


def test_a_save_folder_that_cannot_be_made_fails_the_save(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(SaveError, match="step 3 could not be saved to .*File exists"):
        Checkpointer(tmp_path / "checkpoints").save(state(Tiny()))


def test_an_interrupt_during_a_save_stays_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Checkpointer(tmp_path).save(state(Tiny()))
    assert list(tmp_path.iterdir()) == []


def _killed_at(call: int, save: Callable[[], object]) -> bool:
    """Run `save` in a fork that dies by SIGKILL at its `call`-th call that changes what lasts on disk."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def deadly(real: Callable[..., object]) -> Callable[..., object]:
            def wrapped(*args: object, **kwargs: object) -> object:
                if next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return wrapped

        for name in ("fsync", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        status = 1
        try:
            save()
            status = 0
        finally:
            os._exit(status)  # whatever happens, no second pytest
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the save failed"
    return os.WIFSIGNALED(status)


def _kill_everywhere(index: int, parent: Path) -> None:
    folder, keep = parent / str(index), (-1, 1)[index]  # with deletions too
    run = build()
    train(*run)
    checkpointer = Checkpointer(folder, keep=keep)
    checkpointer.save(state(*run, step=0))
    found, call = [], 0
    while True:
        call += 1
        # A run that starts again knows nothing of the one before: each attempt has its own Checkpointer.
        killed = _killed_at(call, partial(Checkpointer(folder, keep=keep).save, state(*run, step=call)))
        path = newest(checkpointer)
        assert path is not None
        checkpointer.load(path, state(*build(seed=1)))
        found.append((killed, path.name == f"step-{call}"))
        if not killed:
            break
    assert found[0] == (True, False) and found[-1] == (False, True)
    assert (True, True) in found  # killed after the rename: the new one counts
    assert len(found) > 12  # the points are really there
    Checkpointer(folder).save(state(*run, step=1000))
    assert not list(folder.glob("*.tmp-*"))  # what killed runs left is gone


@pytest.mark.dist
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    # In processes of their own: this one may have threads and a GPU open, which a fork does not survive.
    forks.in_processes(_kill_everywhere, (tmp_path,), 2)


# Asynchronous


def test_an_asynchronous_save_holds_the_weights_of_its_call(tmp_path: Path) -> None:
    run, other = build(), build(seed=1)
    train(*run)
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    path = checkpointer.save(state(*run))
    frozen = copy.deepcopy(run[0].state_dict())
    train(*run)  # goes on while the thread writes
    assert checkpointer.wait() == path
    assert checkpointer.wait() is None
    checkpointer.load(path, state(*other))
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in other[0].state_dict().items())
    train(*other)
    assert_same(run, other)


def test_a_save_copies_nothing_and_the_next_update_waits_for_the_copy(tmp_path: Path) -> None:
    """Whatever the size of the model: no parameter is copied before `save` returns, and no file is made."""
    run, other = build(), build(seed=1)
    train(*run)
    frozen = copy.deepcopy(run[0].state_dict())
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    busy = threading.Event()
    checkpointer._thread.submit(busy.wait)  # whatever the thread is for, it does not do yet
    path = checkpointer.save(state(*run))
    assert not list(tmp_path.iterdir())
    stepping = threading.Thread(target=train, args=run)
    stepping.start()
    stepping.join(0.2)
    assert stepping.is_alive(), "the update waits"
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in run[0].state_dict().items())
    busy.set()
    stepping.join()
    assert checkpointer.stage.waited > 0.1
    checkpointer.wait()
    assert any(not torch.equal(tensor, frozen[name]) for name, tensor in run[0].state_dict().items())
    checkpointer.load(path, state(*other))
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in other[0].state_dict().items())


def test_a_save_keeps_buffers_as_they_were_when_it_was_called(tmp_path: Path) -> None:
    """A forward may change them, before any update."""
    run, other = build(), build(seed=1)
    train(*run)
    run[0].register_buffer("seen", torch.zeros(3))
    other[0].register_buffer("seen", torch.ones(3))
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    busy = threading.Event()
    checkpointer._thread.submit(busy.wait)
    path = checkpointer.save(state(*run))
    run[0].get_buffer("seen").add_(5)
    busy.set()
    checkpointer.wait()
    checkpointer.load(path, state(*other))
    assert other[0].get_buffer("seen").tolist() == [0.0, 0.0, 0.0]


def test_a_failed_asynchronous_save_surfaces_at_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    checkpointer = Checkpointer(tmp_path / "checkpoints", asynchronous=True)
    checkpointer.save(state(Tiny()))
    with pytest.raises(SaveError, match="step 3"):
        checkpointer.save(state(Tiny(), step=4))
    (tmp_path / "checkpoints").unlink()
    checkpointer.save(state(Tiny(), step=4))
    path = checkpointer.wait()
    assert path is not None and path.name == "step-4"


# Retention


def test_the_newest_are_kept_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in range(1, 6):
        checkpointer.save(state(Tiny(), step=step))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-4", "step-5"]
    flip(tmp_path / "step-5" / "model-00000.safetensors")  # found by reading it
    assert newest(checkpointer) == tmp_path / "step-4"
    checkpointer.save(state(Tiny(), step=5))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-4", "step-5", "step-5-r1"]
    cut(tmp_path / "step-4" / "trainer.json")  # found by its size
    checkpointer.save(state(Tiny(), step=6))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-4", "step-5", "step-5-r1", "step-6"]


def test_the_checkpoint_just_written_is_kept_even_if_another_has_a_higher_step(tmp_path: Path) -> None:
    Checkpointer(tmp_path).save(state(Tiny(), step=9))
    assert Checkpointer(tmp_path, keep=1).save(state(Tiny(), step=5)).is_dir()


@pytest.mark.parametrize("keep", [0, -2])
def test_keeping_none_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="write -1 to keep all"):
        Checkpointer("anywhere", keep=keep)


# Checkpoints that mean harm


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["model-00000.safetensors", "tensors.json", "trainer.json", "config.yaml"])
def test_a_pickle_in_a_checkpoint_is_never_run(
    saved: tuple[Path, tuple[nn.Module, Optimizer]], tmp_path: Path, name: str
) -> None:
    folder, (model, optimizer) = saved
    bomb = pickle.dumps(_Bomb(tmp_path / "exploded"))
    path = folder / "step-2"
    size = (path / name).stat().st_size
    for target in (".metadata", ".metadata.tmp", "__0_0.distcp", name):
        (path / target).write_bytes(bomb.ljust(size, b"\0") if target == name else bomb)
    reseal(path)
    for use in (lambda: Checkpointer(folder).load(path, state(model, optimizer)), lambda: read(path)):
        try:
            use()
        except CheckpointError as error:
            assert "\n" not in str(error)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # the bomb was live


def test_yaml_tags_in_a_config_build_no_objects(saved: tuple[Path, tuple[nn.Module, Optimizer]]) -> None:
    folder, _ = saved
    (folder / "step-2" / "config.yaml").write_text("!!python/object/apply:os.getcwd []")
    reseal(folder / "step-2")
    with pytest.raises(CheckpointError, match="config.yaml: is malformed"):
        read(folder / "step-2")


def reseal(path: Path) -> None:
    """Make the manifest fit the files, as someone who means harm would."""
    listed = json.loads((path / MANIFEST).read_text())
    listed["files"] = {name: manifest.measure(path / name)._asdict() for name in listed["files"]}
    (path / MANIFEST).write_text(json.dumps(listed))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..", ""])
def test_a_manifest_cannot_name_files_outside(saved: tuple[Path, tuple[nn.Module, Optimizer]], name: str) -> None:
    folder, _ = saved
    listed = json.loads((folder / "step-2" / MANIFEST).read_text())
    listed["files"][name] = {"bytes": 1, "sha256": "0"}
    (folder / "step-2" / MANIFEST).write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        verify(folder / "step-2")


def test_an_index_cannot_name_files_or_boxes_outside(saved: tuple[Path, tuple[nn.Module, Optimizer]]) -> None:
    folder, (model, _) = saved
    path = folder / "step-2"
    original = json.loads((path / "tensors.json").read_text())
    changes: list[tuple[str, object]] = [
        ("rank", 1), ("rank", -1), ("rank", "x"), ("offsets", [-1, 0]), ("offsets", [1, 0]), ("offsets", "x"),
        ("shape", [7]), ("shape", [3, 4]), ("count", 2), ("count", -1), ("count", 1 << 40),
    ]  # fmt: skip
    for key, value in changes:
        index = copy.deepcopy(original)
        index["layouts"][index["tensors"]["model/linear.weight"]["layout"]][0][key] = value
        (path / "tensors.json").write_text(json.dumps(index))
        reseal(path)
        with pytest.raises(CheckpointError):
            load_model_only(path, model)


# Several processes


def _spread(seed: int, layout: str) -> tuple[nn.Module, Optimizer]:
    """The tiny model over two ranks: FSDP, or FSDP with the experts split over an expert axis."""
    model = Tiny(seed)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    if layout == "expert":
        model.w1 = nn.Parameter(distribute_tensor(model.w1.detach(), mesh, [Shard(0)]))
        fully_shard(model.linear, mesh=mesh)
        fully_shard(model.head, mesh=mesh)
    else:
        fully_shard(model, mesh=mesh)
    return model, AdamWConfig(lr=0.01, state_dtype="int8").build(model)


def _halves(name: str, mesh: DeviceMesh | None = None, seed: int = 0) -> tuple[nn.Module, Optimizer]:
    """A run of weights in halves, after three steps; of two ranks, the second one has no expert."""
    model, _ = build(seed, split=True)
    model.w1 = nn.Parameter(model.w1.detach()[:1])
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    optimizer = check(OptimizerConfig, {"name": name, "lr": 0.01, "master_weights": "fp32_split"}).build(model)
    train(model, optimizer)
    return model, optimizer


def _two_ranks(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sharded, expert = _spread(0, "shard"), _spread(1, "expert")
    single = Checkpointer(folder / "single")  # one process has written to it before
    single.load(folder / "single" / "step-3", state(*sharded))
    for asynchronous in (False, True):
        checkpointer = Checkpointer(folder / "spread", asynchronous=asynchronous)
        checkpointer.save(state(*sharded, step=1 + asynchronous))
        path = checkpointer.wait()
    assert path == folder / "spread" / "step-2"
    checkpointer.load(path, state(*expert))
    assert_same(sharded, expert)
    assert single.save(state(*expert, step=6)) == folder / "single" / "step-6"

    limit = 1000 if rank == 1 else resource.RLIM_INFINITY
    try:
        with full_disk(limit):
            single.save(state(*expert, step=7))
        raise AssertionError("an error on one rank fails all")
    except SaveError as error:
        assert "rank 1: OSError: [Errno 27] File too large" in str(error)
    assert newest(single) == folder / "single" / "step-6"
    if rank == 0:
        flip(folder / "single" / "step-6" / "model-00001.safetensors")
    dist.barrier()
    assert newest(single) == folder / "single" / "step-3"
    for name in SPLITTING:
        run, other = (_halves(name, init_device_mesh("cpu", (2,)), seed) for seed in (0, 1))
        checkpointer.load(Checkpointer(folder / name).save(state(*run)), state(*other))
        for p, q in zip(run[0].parameters(), other[0].parameters(), strict=True):
            assert torch.equal(full(weight_of(p, run[1])), full(weight_of(q, other[1])))
    dist.destroy_process_group()


@pytest.mark.dist
def test_a_checkpoint_loads_on_any_number_of_processes_and_mesh(tmp_path: Path) -> None:
    one = build(seed=0, state_dtype="int8")  # some of the state has other shapes than its parameter
    train(*one)
    Checkpointer(tmp_path / "single").save(state(*one))
    forks.in_processes(_two_ranks, (tmp_path,), 2)
    flip(tmp_path / "single" / "step-6" / "model-00001.safetensors")  # damaged there; whole again by this
    for name in SPLITTING:
        other = _halves(name, seed=1)
        Checkpointer(tmp_path).load(tmp_path / name / "step-3", state(*other))
        assert_same(_halves(name), other)

    for path in ("spread/step-1", "spread/step-2", "single/step-6"):  # in the step, in a thread, by experts
        other = build(seed=5, state_dtype="int8")
        Checkpointer(tmp_path).load(tmp_path / path, state(*other))
        assert_same(one, other)
    by_dcp = {name: torch.zeros_like(tensor) for name, tensor in other[0].state_dict().items()}
    dcp.load(by_dcp, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "spread" / "step-2")), no_dist=True)
    assert all(torch.equal(by_dcp[name], tensor) for name, tensor in one[0].state_dict().items())
