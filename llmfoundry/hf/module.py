"""Trains `transformers` causal language models unchanged, for architectures that llmfoundry's own model cannot express.

Works for any architecture that `AutoModelForCausalLM` builds from a config.json without remote code, with the same
trainer, FSDP2, checkpoints, adapters and exports. Such a model does not use llmfoundry's MoE layer: there are no Triton
expert kernels, no expert parallelism and no balance loss. Documents within a row are not masked from each other.

Shapes: B rows, S sequence, V vocab.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmfoundry.config import ConfigError, check
from llmfoundry.data.rows import IGNORE
from llmfoundry.hf.family import ConfigDict, Family
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.attention import FULL, AttentionConfig, GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig, MLPConfig
from llmfoundry.layers.lora import add_adapters
from llmfoundry.model.transformer import AdapterParams, Cache, CausalLM, CausalLMConfig, Output

PREFIX = "module."  # of its parameter names in an llmfoundry state dict
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
            "n_heads": theirs.num_attention_heads,
            "n_layers": theirs.num_hidden_layers,
            "vocab_size": theirs.vocab_size,
            "tie_word_embeddings": bool(theirs.tie_word_embeddings),
        }
        limit = getattr(theirs, "max_position_embeddings", None)
        longest = {"max_seq_len": limit} if isinstance(limit, int) and "max_seq_len" not in data else {}
        return {**data, **sizes, **longest}

    @property
    def has_learned_positions(self) -> bool:
        """True, because it is unknown: no text longer than `max_seq_len` is accepted."""
        return True

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
    """A head that uses the embedding's weight and has no parameter of its own, so that each weight has one name."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # not registered as a submodule

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.__dict__["embedding"].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (B, S, V) from (B, S, D)."""
        return F.linear(x, self.weight)


class TransformersLM(CausalLM):
    """A `transformers` module with the forward signature of `CausalLM`."""

    own_blocks = False  # compiled blocks and the planner only support llmfoundry's own model

    def __init__(self, config: TransformersConfig) -> None:
        nn.Module.__init__(self)
        self.config: CausalLMConfig = config
        self.module = _built(config.hf_config)
        self.module.config.use_cache = False
        if config.tie_word_embeddings:
            self.module.set_output_embeddings(_TiedHead(self.module.get_input_embeddings()))

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
        past = None
        if cache is not None:
            past = cache.theirs = cache.theirs or DynamicCache()
        found = self.module(
            input_ids=tokens, past_key_values=past, use_cache=cache is not None, logits_to_keep=1 if last_only else 0
        )
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


class AsItIs(Family):
    """The family of one such model: its tensors keep their names."""

    sizes = {"n_layers": "num_hidden_layers", "max_seq_len": "max_position_embeddings"}  # noqa: RUF012
    prefix = ""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type  # type: ignore[misc]
        self.title = f"{model_type}, unchanged"  # type: ignore[misc]
        self.architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]  # type: ignore[misc]

    def read(self, data: Mapping[str, object], where: str) -> TransformersConfig:
        settings = {key: value for key, value in data.items() if key not in _NO_SETTINGS}
        config = check(TransformersConfig, {"name": "transformers", "hf_config": settings}, where=where)
        with torch.device("meta"):
            module = _built(settings)
        names = {id(parameter): name for name, parameter in module.named_parameters(remove_duplicate=False)}
        names |= {id(parameter): name for name, parameter in module.named_parameters()}  # of tied ones, the first
        named = _stored_names(module)
        self.embedding = named(names[id(module.get_input_embeddings().weight)])  # type: ignore[misc]
        head = module.get_output_embeddings()
        self.head = named(next(f"{name}.weight" for name, part in module.named_modules() if part is head))  # type: ignore[misc]
        return config

    def weights(self, names: Iterable[str], config: CausalLMConfig) -> set[str]:
        """Return all names except buffers, which the module computes."""
        return {name for name in names if re.fullmatch(self.buffers, name) is None}

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        if not isinstance(config, TransformersConfig):
            raise ConfigError(f"a module of {self.model_type}")
        return cast(ConfigDict, copy.deepcopy(config.hf_config))

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        assert isinstance(config, TransformersConfig)
        with torch.device("meta"):
            module = _built(config.hf_config)
        named = _stored_names(module)
        for name in pieces.shapes:
            pieces.add(name, named(name.removeprefix(PREFIX)))


def _stored_names(module: PreTrainedModel) -> Callable[[str], str]:
    """Return a function from a module's parameter names to the names in its files, which may be older ones."""
    renamed = [each for each in get_model_conversion_mapping(module) if isinstance(each, WeightRenaming)]
    back = [cast(WeightRenaming, each.reverse_transform()) for each in reversed(renamed)]
    return lambda name: rename_source_key(name, back, [], reverse=True)[0]


def is_stored_otherwise(settings: Mapping[str, object]) -> bool:
    """Return whether the files store tensors in another form than the module, e.g. experts separately."""
    with torch.device("meta"):
        mapping = get_model_conversion_mapping(_built(dict(settings)))
    return any(not isinstance(each, WeightRenaming) for each in mapping)


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
        found = CONFIG_MAPPING[cast(str, model_type)].from_dict(copy.deepcopy(settings))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"hf_config: {' '.join(str(error).split())}") from None
    assert isinstance(found, PreTrainedConfig)
    return found
