"""Trains `transformers` causal language models unchanged, for architectures that llmfoundry's own model cannot express.

Works for any architecture that `AutoModelForCausalLM` builds from a config.json without remote code, with the same
trainer, FSDP2, checkpoints, adapters and exports. Such a model does not use llmfoundry's MoE layer: there are no Triton
expert kernels, no expert parallelism and no balance loss. Documents within a row are not masked from each other.

Shapes: B rows, S sequence, V vocab.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmfoundry.config import ConfigError, check
from llmfoundry.data.rows import IGNORE
from llmfoundry.hf.family import ConfigDict, Family
from llmfoundry.hf.pieces import Piece, Pieces
from llmfoundry.hf.stored import stored
from llmfoundry.layers.attention import FULL, AttentionConfig, GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig, MLPConfig
from llmfoundry.layers.lora import add_adapters
from llmfoundry.model.transformer import AdapterParams, Cache, CausalLM, CausalLMConfig, Output

log = logging.getLogger(__name__)

PREFIX = "module."  # of its parameter names in an llmfoundry state dict
# Model types for which `is_decoder` does not decide whether attention is causal.
_NOT_CAUSAL, _CAUSAL = {"cpmant", "xlm", "xlnet"}, {"gpt_neox", "gpt_neox_japanese"}
# Keys of config.json that do not describe the model.
_NO_SETTINGS = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "auto_map"}


class TransformersConfig(CausalLMConfig, names=("transformers",)):
    """A model given by its config.json. Of the usual model keys, only those of adapters and initial weights apply."""

    hf_config: dict[str, object]  # the contents of config.json, with model_type
    d_model: int = Field(default=1, exclude=True)  # this and the sizes below are read from hf_config
    n_heads: int = Field(default=1, exclude=True)
    n_layers: int = Field(default=1, exclude=True)
    vocab_size: int = Field(default=1, exclude=True)
    tie_word_embeddings: bool = Field(default=True, exclude=True)
    expansion_ratio: float = Field(default=4.0, exclude=True)
    no_bias: bool = Field(default=False, exclude=True)
    norm_type: str = Field(default="layernorm", exclude=True)  # type: ignore[assignment]
    norm_eps: float = Field(default=1e-5, exclude=True)
    learned_pos_emb: bool | None = Field(default=None, exclude=True)
    final_logit_softcapping: float | None = Field(default=None, exclude=True)
    attn_window_pattern: list[int] | None = Field(default=None, exclude=True)
    attn_config: AttentionConfig = Field(default=GroupedQueryConfig(), exclude=True)
    ffn_config: FFNConfig = Field(default=MLPConfig(), exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, data: object) -> object:
        """Fill in the sizes that other components need from `hf_config`."""
        if not isinstance(data, dict) or not isinstance(data.get("hf_config"), dict):
            return data
        theirs = _theirs(data["hf_config"]).get_text_config()
        sizes = {
            "d_model": theirs.hidden_size,
            "n_heads": getattr(theirs, "num_attention_heads", 1),  # a model without attention has no heads
            "n_layers": theirs.num_hidden_layers,
            "vocab_size": theirs.vocab_size,
            "tie_word_embeddings": bool(getattr(theirs, "tie_word_embeddings", False)),
        }
        limit = getattr(theirs, "max_position_embeddings", None)
        longest = {"max_seq_len": limit} if isinstance(limit, int) and "max_seq_len" not in data else {}
        return {**data, **sizes, **longest}

    @property
    def has_learned_positions(self) -> bool:
        """True, because it is unknown: no text longer than `max_seq_len` is accepted."""
        return True

    @property
    def has_stacked_experts(self) -> bool:
        """Whether blocks hold the matrices of all experts in one tensor, for which adapters are not supported."""
        return any(parameter.dim() == 3 for parameter in self._on_meta().blocks.parameters())

    def window(self, layer: int) -> int:
        return FULL

    def n_params(self) -> int:
        return sum(parameter.numel() for parameter in self._on_meta().parameters())

    def n_active_params(self) -> int:
        """Count all parameters: which experts of a `transformers` model are active is not known here."""
        return self.n_params()

    def n_trainable_params(self) -> int:
        return sum(parameter.numel() for parameter in self._on_meta().parameters() if parameter.requires_grad)

    def flops_per_token(self, seq_len: int | None = None) -> float:
        """Return 6 per parameter, excluding an untied embedding and attention scores."""
        looked_up = 0 if self.tie_word_embeddings else self.vocab_size * self.d_model
        return 6.0 * (self.n_params() - looked_up)

    def build(self) -> TransformersLM:
        model = TransformersLM(self)
        if self.lora is not None:
            add_adapters(model, model.blocks, self.lora)
        return model

    def _adapter_params(self) -> AdapterParams:
        count = self.n_trainable_params() if self.lora is not None else 0
        return AdapterParams(count, count, 0)

    def _on_meta(self) -> TransformersLM:
        with torch.device("meta"):
            return self.build()


class _TiedHead(nn.Module):
    """A head that uses the embedding's weight and has at most its own bias, so that each weight has one name."""

    def __init__(self, embedding: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # not registered as a submodule
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.__dict__["embedding"].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (B, S, V) from (B, S, D)."""
        return F.linear(x, self.weight, self.bias)


class TransformersLM(CausalLM):
    """A `transformers` module with the forward signature of `CausalLM`."""

    own_blocks = False  # compiled blocks and the planner only support llmfoundry's own model

    def __init__(self, config: TransformersConfig) -> None:
        nn.Module.__init__(self)
        self.config: CausalLMConfig = config
        self.module = _built(config.hf_config)
        self.module.config.use_cache = False
        if config.tie_word_embeddings:
            head = self.module.get_output_embeddings()
            bias = cast(nn.Parameter | None, getattr(head, "bias", None))
            self.module.set_output_embeddings(_TiedHead(self.module.get_input_embeddings(), bias))

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The decoder layers: the longest ModuleList."""
        lists = [part for part in self.module.modules() if isinstance(part, nn.ModuleList)]
        return max(lists, key=len)

    @property
    def wte(self) -> nn.Embedding:  # type: ignore[override]
        """The embedding."""
        return cast(nn.Embedding, self.module.get_input_embeddings())

    @property
    def lm_head(self) -> nn.Module | None:  # type: ignore[override]
        """The head; None if it is tied."""
        return None if self.config.tie_word_embeddings else cast(nn.Module, self.module.get_output_embeddings())

    @torch.no_grad()
    def init_buffers(self) -> None:
        """Initialize everything that is not a matrix, as `transformers` does: norms, RoPE frequencies, scales."""
        for part in self.module.modules():
            has_matrix = any(parameter.dim() >= 2 for parameter in part.parameters(recurse=False))
            if not has_matrix or any(True for _ in part.buffers(recurse=False)):
                self.module._init_weights(part)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        sequence_ids: Tensor | None = None,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
        by_token: bool = False,
        at: Tensor | None = None,
    ) -> Output:
        """As `CausalLM.forward`; `sequence_ids` and `keys` are ignored."""
        found = self.module(**self._with_past(tokens, cache), logits_to_keep=1 if last_only else tokens.shape[1])
        logits = found.logits  # (B, S, V), or (B, 1, V)
        if at is not None:
            logits = logits.flatten(0, 1)[at].unsqueeze(0)
        if labels is None:
            return Output(logits, None, None, None)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        nats = F.cross_entropy(
            logits.flatten(0, 1).to(dtype), labels.flatten(), ignore_index=IGNORE, reduction="none"
        ).view_as(tokens)
        return Output(None, nats.sum(), nats if by_token else nats.detach(), None)

    def _with_past(self, tokens: Tensor, cache: Cache | None) -> dict[str, object]:
        """Return the module's arguments. A module with its own kind of cache reads the whole text again."""
        if cache is None:
            return {"input_ids": tokens, "use_cache": False}
        if self._takes_cache:
            past = cache.theirs = cache.theirs or DynamicCache(config=self.module.config)
            return {"input_ids": tokens, "past_key_values": past, "use_cache": True}
        cache.theirs = tokens if cache.theirs is None else torch.cat([cast(Tensor, cache.theirs), tokens], 1)
        return {"input_ids": cache.theirs, "use_cache": False}

    @cached_property
    def _takes_cache(self) -> bool:
        has_own = not self.module._supports_default_dynamic_cache()  # type: ignore[operator]
        return not has_own and "past_key_values" in inspect.signature(self.module.forward).parameters


class AsItIs(Family):
    """The family of one such model: its tensors keep their names."""

    sizes = {"n_layers": "num_hidden_layers", "max_seq_len": "max_position_embeddings"}  # noqa: RUF012
    prefix = ""
    layouts = ("stored", "module")  # names as in files that `transformers` writes, or as in the module

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type  # type: ignore[misc]
        self.title = f"{model_type}, unchanged"  # type: ignore[misc]
        self.architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]  # type: ignore[misc]
        self._own: set[str] = set()  # names of the tensors in files that the module has
        self._passed_over: list[str] = []  # patterns of other tensors that `transformers` ignores

    def read(self, data: Mapping[str, object], where: str) -> TransformersConfig:
        settings = {key: value for key, value in data.items() if key not in _NO_SETTINGS}
        config = check(TransformersConfig, {"name": "transformers", "hf_config": settings}, where=where)
        with torch.device("meta"):
            module = _built(settings)
        names = {id(parameter): name for name, parameter in module.named_parameters(remove_duplicate=False)}
        names |= {id(parameter): name for name, parameter in module.named_parameters()}  # of tied ones, the first
        pieces = _stored(module, where)
        named = {found[0].ours.name: name for name, found in pieces.items() if len(found) == 1}
        self._own = pieces.keys() | module.state_dict().keys()
        self._passed_over = list(module._keys_to_ignore_on_load_unexpected or ())
        self.embedding = named[PREFIX + names[id(module.get_input_embeddings().weight)]]  # type: ignore[misc]
        head = module.get_output_embeddings()
        self.head = named[next(f"{PREFIX}{name}.weight" for name, part in module.named_modules() if part is head)]  # type: ignore[misc]
        return config

    def weights(self, names: Iterable[str], config: CausalLMConfig) -> set[str]:
        """Return all names except buffers that the module computes, and tensors that `transformers` ignores too."""
        found = {name for name in names if re.fullmatch(self.buffers, name) is None}
        others = {each for each in found - self._own if any(re.search(pattern, each) for pattern in self._passed_over)}
        if others:
            log.info(
                "tensors that %s has no place for are left out, as in transformers: %d (e.g. %s)",
                self.architecture, len(others), min(others),
            )  # fmt: skip
        return found - others

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        if not isinstance(config, TransformersConfig):
            raise ConfigError(f"a module of {self.model_type}")
        return cast(ConfigDict, copy.deepcopy(config.hf_config))

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        assert isinstance(config, TransformersConfig)
        if layout == "module":
            for name in pieces.shapes:
                pieces.add(name, name.removeprefix(PREFIX))
            return
        with torch.device("meta"):
            module = _built(config.hf_config)
        for found in _stored(module, "config.json").values():
            pieces.pieces += [each for each in found if each.ours.name in pieces.shapes]


def _stored(module: PreTrainedModel, where: str) -> dict[str, list[Piece]]:
    try:
        return stored(module, PREFIX)
    except ValueError as error:
        raise ConfigError(f"{where}: {module.config.model_type}: {error}") from None


def is_known(model_type: object) -> bool:
    """Return whether `transformers` has a causal language model of this type."""
    return isinstance(model_type, str) and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _built(settings: dict[str, object]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(_theirs(settings), trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    return model


def _theirs(settings: dict[str, object]) -> PreTrainedConfig:
    model_type = settings.get("model_type")
    if not is_known(model_type):
        raise ValueError(f"hf_config.model_type: {model_type!r} is not a causal language model of transformers")
    try:
        found = CONFIG_MAPPING[cast(str, model_type)].from_dict(
            cast(dict[str, object], _with_infinities(copy.deepcopy(settings)))
        )
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"hf_config: {' '.join(str(error).split())}") from None
    assert isinstance(found, PreTrainedConfig)
    if model_type in _NOT_CAUSAL or (getattr(found, "is_decoder", True) is False and model_type not in _CAUSAL):
        raise ValueError(
            f"hf_config: {model_type} attends to tokens that follow, so it cannot be trained as a causal language "
            "model" + ("" if model_type in _NOT_CAUSAL else "; with is_decoder: true in config.json it does not")
        )
    return found


def _with_infinities(value: object) -> object:
    """Decode the numbers that JSON cannot represent from the form in which `transformers` writes them."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and isinstance(value["__float__"], str):
            return float(value["__float__"])
        return {key: _with_infinities(each) for key, each in value.items()}
    return [_with_infinities(each) for each in value] if isinstance(value, list) else value
