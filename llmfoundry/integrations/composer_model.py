"""Wraps an llmfoundry model for Composer, with what its loop lacks: clipping over all meshes, and router balance.

With `accumulate_train_batch_on_tokens`, Composer's loss is the sum over the labels of the global batch divided by their
number, as in train/step.py.

Shapes: B rows, S sequence, L MoE layers, E experts.
"""

from __future__ import annotations

import llmfoundry.integrations.torchvision_operators  # noqa: F401  before composer

# isort: split
import torch
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import Metric

from llmfoundry import runtime
from llmfoundry.config import ConfigError, dump
from llmfoundry.data.rows import IGNORE
from llmfoundry.hf.facts import weight_differences
from llmfoundry.integrations.composer_checkpoint import SETTINGS, model_config
from llmfoundry.integrations.composer_rows import Rows
from llmfoundry.model.transformer import Block, CausalLM, CausalLMConfig, Output
from llmfoundry.moe.balance import Balance, load_balance_loss, update_expert_bias, z_loss
from llmfoundry.train.optim import clip_by_global_norm


class LanguageCrossEntropy(Metric):
    """Nats per label, over all batches and ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_labels", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.nats: Tensor
        self.n_labels: Tensor

    def update(self, nats: Tensor, n_labels: Tensor) -> None:
        """Add a batch: its summed nats, and its number of labels."""
        self.nats += nats.detach()
        self.n_labels += n_labels

    def compute(self) -> Tensor:
        """Return the nats per label so far, ()."""
        return self.nats / self.n_labels


class ComposerCausalLM(ComposerModel):
    """An llmfoundry model as a ComposerModel.

    Args:
        model: sharded by `parallelize`, or not at all; then Composer may distribute it by DDP or FSDP2.
        noise_seed: for routers with jitter; the run's seed.
    """

    def __init__(self, model: CausalLM, noise_seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.balance = Balance.of(model.config)
        # Composer averages gradients over ranks and divides the loss accordingly; `parallelize` sums them.
        self.sums_gradients = isinstance(model, FSDPModule)
        self._first_key = runtime.seed_of("noise", noise_seed) // 2  # // 2 avoids overflow
        self._load: Tensor | None = None  # (L, E) slots of this rank's microbatches so far
        self._labels_per_token: float | None = None  # of the global batch
        vars(model)["fsdp_wrap_fn"] = _is_unit  # read by Composer's FSDP2

    def forward(self, batch: Rows) -> Output:
        """Compute the loss of a batch, summed over its labels, and the router statistics."""
        return self.model(
            batch["tokens"],
            batch["labels"],
            sequence_ids=batch.get("sequence_ids"),
            positions=batch.get("positions"),
            keys=batch["rows"] + self._first_key,
        )

    def eval_forward(self, batch: Rows, outputs: Output | None = None) -> Output:
        """As `forward`."""
        return self.forward(batch) if outputs is None else outputs

    def loss(self, outputs: Output, batch: Rows) -> dict[str, Tensor]:
        """Return nats per label of a microbatch, and `total`, which includes the router losses and is differentiated.

        Composer weights microbatches and ranks by their labels, so that the loss is that of the global batch. The
        router losses are means over tokens; they are scaled here so that the same holds for them. The balance loss uses
        the load of this microbatch over all ranks.
        """
        assert outputs.loss_sum is not None
        n_labels = (batch["labels"] != IGNORE).sum().clamp(min=1)
        ce = outputs.loss_sum / n_labels
        total = ce
        if self.balance is not None and outputs.router is not None:
            stats, balance = outputs.router, self.balance
            load = stats.load.detach()
            self._load = load if self._load is None else self._load + load
            if balance.scope == "global_batch":
                load = runtime.all_reduce_sum(load.clone())
            aux = balance.z_loss_weight * z_loss(stats.z_sum)
            aux = aux + balance.loss_weight * load_balance_loss(stats.score_sum, load, balance.together)
            per_token = self._labels_per_token or n_labels / batch["tokens"].numel()
            total = ce + aux / n_labels * per_token
        if self.sums_gradients:  # keeps the value, divides the gradient
            total = total.detach() + (total - total.detach()) / runtime.world_size()
        return {"ce": ce.detach(), "total": total}

    def begin_batch(self, batch: Rows) -> None:
        """Count the labels and tokens of a global batch, given this rank's part; called by all ranks together."""
        counts = torch.stack([(batch["labels"] != IGNORE).sum(), torch.tensor(batch["tokens"].numel())])
        n_labels, n_tokens = runtime.all_reduce_sum(counts.to(runtime.device())).tolist()
        self._labels_per_token, self._load = n_labels / n_tokens, None

    def take_load(self) -> Tensor | None:
        """Return (L, E) slots of the global batch since the last call, or None for a dense model. A collective."""
        load, self._load = self._load, None
        return None if load is None else runtime.all_reduce_sum(load)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return `LanguageCrossEntropy` for evaluations; the training loss is always logged."""
        return {} if is_train else {"LanguageCrossEntropy": LanguageCrossEntropy()}

    def update_metric(self, batch: Rows, outputs: Output, metric: Metric) -> None:
        """Add a batch to a metric."""
        metric.update(outputs.loss_sum, (batch["labels"] != IGNORE).sum())


class GlobalNormClipping(Algorithm):
    """`algorithms.gradient_clipping`, with the norm over all ranks and meshes; non-finite gradients are dropped.

    Composer's own clipping cannot combine the norms of experts and other parameters, which are on two meshes.
    """

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm

    def match(self, event: Event, state: State) -> bool:
        """Match after the backward of the last microbatch."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip, and log the norm before clipping."""
        norm = float(clip_by_global_norm(state.model.parameters(), self.max_norm))
        logger.log_metrics({"grad_norm": norm})
        if not torch.isfinite(torch.tensor(norm)):  # the same on every rank
            for optimizer in state.optimizers:
                optimizer.zero_grad(set_to_none=True)  # so that nothing is updated
            _inner(state.model).take_load()


class RouterBalance(Algorithm):
    """What routers need of the global batch: its labels, to scale their losses, and its load, to update their biases.

    With `moe_bias_update_rate`, each router's bias moves towards an even load once per step.
    """

    def match(self, event: Event, state: State) -> bool:
        """Match before the first microbatch, and after the update, before evaluation and checkpoints."""
        return event in (Event.BEFORE_TRAIN_BATCH, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Count labels and tokens, or update the biases."""
        model = _inner(state.model)
        if event == Event.BEFORE_TRAIN_BATCH:
            model.begin_batch(state.batch)
            return
        load = model.take_load()
        if load is not None and model.balance is not None:
            update_expert_bias(model.model, load, model.balance)


class LLMFoundrySettings(Callback):
    """Stores the model's config in Composer's checkpoints, where `convert.py from-composer` finds it."""

    def __init__(self, config: CausalLMConfig) -> None:
        self.config = config

    def state_dict(self) -> dict[str, object]:
        """Return the model's config for a checkpoint."""
        return {"model": dump(self.config)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Reject the checkpoint of a model that computes something else."""
        saved = state["model"]
        assert isinstance(saved, dict)
        check_same("the checkpoint", saved, self.config)


assert LLMFoundrySettings.__name__ == SETTINGS


def check_same(where: str, saved: dict[str, object], config: CausalLMConfig) -> None:
    """Reject weights of a model that computes something else."""
    for key, (before, now) in weight_differences(model_config(saved, f"{where}: model"), config).items():
        raise ConfigError(f"model.{key}: is {now!r}, but {before!r} in {where}")


def _is_unit(module: nn.Module) -> bool:
    """Return whether Composer's FSDP2 shards this module as a unit: each block, and the rest."""
    return isinstance(module, Block | CausalLM)


def _inner(model: nn.Module) -> ComposerCausalLM:
    """Return the model inside DDP."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, ComposerCausalLM)
    return inner
