"""Every family against `transformers`: logits, loss, gradients, generated tokens, and the way there and back."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from theirs import CASES, VOCAB, Case, in_float64
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmfoundry.hf import from_pretrained, save_pretrained
from llmfoundry.hf.family import known_families, read_config, write_config
from llmfoundry.hf.pieces import Part, Spec, fill
from llmfoundry.hf.pretrained import pieces_of
from llmfoundry.model.transformer import Cache, CausalLM

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model_type}: {case.about}")
TOKENS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _exact_polar(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V2 rotates by torch.polar, which differs from torch.cos and torch.sin in the last bit of float32."""
    monkeypatch.setattr(torch, "polar", lambda size, angle: torch.complex(angle.cos(), angle.sin()) * size)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_every_family_has_three_cases() -> None:
    ours = {name for name, family in known_families().items() if name in CONFIG_MAPPING}  # others have their own tests
    assert {kind for kind in ours if sum(case.model_type == kind for case in CASES) < 3} == set()


@each_case
def test_logits_are_theirs(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = case.build()
    folder = saved(theirs, tmp_path / "theirs")
    with torch.no_grad():
        found, true = from_pretrained(folder).model(TOKENS).logits, theirs(TOKENS).logits
        assert found is not None and true.abs().max() > 0.1
        assert (found - true).abs().max() <= 1e-4
        found = from_pretrained(folder, torch.float64).model(TOKENS).logits
        exact = in_float64(theirs, monkeypatch)(TOKENS).logits
        assert found is not None and found.dtype == torch.float64
        assert (found - exact).abs().max() <= 1e-10


class Gradients:
    """A model's gradients, under the names of its weights."""

    def __init__(self, model: CausalLM) -> None:
        self.found = {name: parameter.grad for name, parameter in model.named_parameters()}
        self.specs = {
            name: Spec(grad.dtype, tuple(grad.shape)) for name, grad in self.found.items() if grad is not None
        }

    def parts(self, name: str) -> list[Part]:
        grad = self.found[name]
        assert grad is not None
        return [Part((0,) * grad.dim(), grad)]

    def release(self) -> None:
        pass


@each_case
def test_loss_and_every_gradient_are_theirs(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = case.build()
    ours = from_pretrained(saved(theirs, tmp_path / "theirs"), torch.float64).model
    theirs = in_float64(theirs, monkeypatch)
    labels = TOKENS.roll(-1, 1)
    true = torch.nn.functional.cross_entropy(theirs(TOKENS).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = ours(TOKENS, labels).loss_sum
    assert loss is not None
    torch.testing.assert_close(loss, true, rtol=1e-4, atol=0.0, check_dtype=False)
    true.backward()
    loss.backward()
    family = known_families()[case.model_type]
    layout = "stacked" if "stacked" in family.layouts else family.layouts[0]
    copies, gradients = pieces_of(family, ours.config, layout).writing(), Gradients(ours)
    checked, largest = 0, max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None, name
        grad = torch.zeros_like(parameter)  # OPT's rows for padding are not filled
        fill(grad, (0,) * grad.dim(), copies[name], gradients)
        scale = parameter.grad.abs().max().clamp_min(1e-6 * largest)  # a router's may be zero, but for rounding
        assert (grad - parameter.grad).abs().max() / scale <= 1e-4, name
        checked += 1
    assert checked >= 10


@each_case
def test_there_and_back_is_the_same_to_the_bit(case: Case, tmp_path: Path) -> None:
    theirs = case.build(torch.bfloat16)
    first = saved(theirs, tmp_path / "theirs")
    ours = from_pretrained(first).model
    save_pretrained(ours, None, tmp_path / "again", model_type=case.model_type)
    one, two = tensors_in(first), tensors_in(tmp_path / "again")
    assert one.keys() - two.keys() <= {"lm_head.weight"} and two.keys() <= one.keys()
    assert all(torch.equal(one[name], two[name]) for name in two)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), again.parameters(), strict=True))
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    assert type(theirs).__name__ in settings["architectures"]


def test_writing_a_small_vocabulary_warns_of_no_other_familys_tokens(caplog: pytest.LogCaptureFixture) -> None:
    case = next(case for case in CASES if case.model_type == "qwen3_moe")
    _, ours = read_config(AutoConfig.for_model(case.model_type, **case.settings).to_dict())
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    write_config(ours)
    transformers_log.removeHandler(caplog.handler)
    assert caplog.text == ""


@each_case
def test_the_names_of_a_live_model_are_read_too(case: Case, tmp_path: Path) -> None:
    """Newer files stack experts as the live model does; older ones have a tensor for each."""
    theirs = case.build()
    first = saved(theirs, tmp_path / "theirs")
    for file in first.glob("*.safetensors*"):
        file.unlink()
    state = {name: value.contiguous().clone() for name, value in theirs.state_dict().items() if "rotary" not in name}
    save_file(state, first / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        found = from_pretrained(first).model(TOKENS).logits
        assert found is not None
        assert (found - theirs(TOKENS).logits).abs().max() <= 1e-4


@each_case
def test_greedy_text_is_theirs(case: Case, tmp_path: Path) -> None:
    theirs = case.build(torch.float64)
    ours = from_pretrained(saved(theirs, tmp_path / "theirs")).model
    true = theirs.generate(TOKENS[:1], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids, cache = TOKENS[:1], Cache(ours.config.n_layers)
    fresh = ids
    with torch.no_grad():
        for _ in range(12):
            logits = ours(fresh, cache=cache, last_only=True).logits
            assert logits is not None
            fresh = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, fresh], dim=1)
    assert torch.equal(ids, true)
