"""Our models, data and routing rules under Composer's `Trainer`, for its algorithms, callbacks and loggers.

`composer_parts` makes from one YAML what a Trainer takes, under the names of its arguments:

    made = composer_parts(config)
    composer.Trainer(**made._asdict(), callbacks=[...]).fit()

It needs `composer`, which `make setup-composer` installs in an environment of its own; docs/composer.md says when to
use it. With `accumulate_train_batch_on_tokens`, which the parts set, Composer's loss is the sum over the labels of the
global batch divided by their number, as in train/step.py.

Shapes: B rows, S sequence, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import llmfoundry.integrations.torchvision_operators  # noqa: F401  before composer

# isort: split
import torch
from composer.core import Algorithm, Callback, DataSpec, Evaluator, Event, State
from composer.loggers import Logger
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from llmfoundry import runtime
from llmfoundry.checkpoint.reading import HUGGING_FACE, load_model_only, read
from llmfoundry.config import ConfigError, dump
from llmfoundry.data.loader import Batch, Loader, LoaderConfig
from llmfoundry.data.rows import IGNORE
from llmfoundry.hf.facts import weight_differences
from llmfoundry.hf.pretrained import load_weights
from llmfoundry.integrations.composer_checkpoint import SETTINGS, model_config
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import Block, CausalLM, CausalLMConfig, Output
from llmfoundry.moe.balance import Balance, load_balance_loss, update_expert_bias, z_loss
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.mesh import build_mesh
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Timeline
from llmfoundry.train.optim import clip_by_global_norm
from llmfoundry.train.schedule import Schedule

Rows = dict[str, Tensor]  # the fields of `Batch` that are there, by name: Composer moves and splits mappings


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
        """Add a batch: its nats, summed, and its labels."""
        self.nats += nats.detach()
        self.n_labels += n_labels

    def compute(self) -> Tensor:
        """() of what was added."""
        return self.nats / self.n_labels


class ComposerCausalLM(ComposerModel):
    """A model of ours as Composer's.

    Args:
        model: sharded by our `parallelize` or not at all; Composer may then spread it by DDP or FSDP2.
        noise_seed: for routers with jitter, the run's seed.
    """

    def __init__(self, model: CausalLM, noise_seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.balance = Balance.of(model.config)
        # Composer averages gradients over ranks, by dividing nothing here but the loss there; our shards sum them.
        self.sums_gradients = isinstance(model, FSDPModule)
        self._first_key = runtime.seed_of("noise", noise_seed) // 2  # // 2: far from overflow
        self._load: Tensor | None = None  # (L, E) slots of this rank's microbatches so far
        self._labels_per_token: float | None = None  # of the global batch
        vars(model)["fsdp_wrap_fn"] = _is_unit  # where Composer's FSDP2 looks for it

    def forward(self, batch: Rows) -> Output:
        """The loss of a batch, summed over its labels, and what its routers did."""
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
        """Nats per label of a microbatch, and `total`: with the routers' losses, which is differentiated.

        Composer weighs microbatches and ranks by their labels, so that the sum is that over the global batch; the
        routers' losses, which are means over tokens, are weighed here so that the same holds for them. The balance loss
        takes the load of this microbatch over all ranks.
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
        if self.sums_gradients:  # the value stays, the gradient is divided
            total = total.detach() + (total - total.detach()) / runtime.world_size()
        return {"ce": ce.detach(), "total": total}

    def begin_batch(self, batch: Rows) -> None:
        """Take this rank's part of a global batch: its labels and tokens count; all ranks together."""
        counts = torch.stack([(batch["labels"] != IGNORE).sum(), torch.tensor(batch["tokens"].numel())])
        n_labels, n_tokens = runtime.all_reduce_sum(counts.to(runtime.device())).tolist()
        self._labels_per_token, self._load = n_labels / n_tokens, None

    def take_load(self) -> Tensor | None:
        """(L, E) slots of the global batch since the last call; all ranks together. None for a dense model."""
        load, self._load = self._load, None
        return None if load is None else runtime.all_reduce_sum(load)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """`LanguageCrossEntropy` of evaluations; the training loss is logged anyway."""
        return {} if is_train else {"LanguageCrossEntropy": LanguageCrossEntropy()}

    def update_metric(self, batch: Rows, outputs: Output, metric: Metric) -> None:
        """Add a batch to a metric."""
        metric.update(outputs.loss_sum, (batch["labels"] != IGNORE).sum())


class GlobalNormClipping(Algorithm):
    """`algorithms.gradient_clipping`: the norm over all ranks and meshes; a gradient that is not finite is dropped.

    Composer's own cannot add the norms of experts and of the rest, which lie on two meshes.
    """

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm

    def match(self, event: Event, state: State) -> bool:
        """After the backward of the last microbatch."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip, and log the norm before."""
        norm = float(clip_by_global_norm(state.model.parameters(), self.max_norm))
        logger.log_metrics({"grad_norm": norm})
        if not torch.isfinite(torch.tensor(norm)):  # the same on every rank
            for optimizer in state.optimizers:
                optimizer.zero_grad(set_to_none=True)  # nothing is updated then
            _inner(state.model).take_load()


class RouterBalance(Algorithm):
    """What routers need of the global batch: its labels, for the scale of their losses; its load, for their biases.

    With `moe_bias_update_rate`, each router's bias moves towards even load once per step.
    """

    def match(self, event: Event, state: State) -> bool:
        """Before the first microbatch; and after the update, before evaluation and checkpoint."""
        return event in (Event.BEFORE_TRAIN_BATCH, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Count, or move the biases."""
        model = _inner(state.model)
        if event == Event.BEFORE_TRAIN_BATCH:
            model.begin_batch(state.batch)
            return
        load = model.take_load()
        if load is not None and model.balance is not None:
            update_expert_bias(model.model, load, model.balance)


class LLMFoundrySettings(Callback):
    """Keeps the model's config in Composer's checkpoints, where `convert.py from-composer` finds it."""

    def __init__(self, config: CausalLMConfig) -> None:
        self.config = config

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint says of the model."""
        return {"model": dump(self.config)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Refuse the checkpoint of a model that computes something else."""
        saved = state["model"]
        assert isinstance(saved, dict)
        _check_same("the checkpoint", saved, self.config)


assert LLMFoundrySettings.__name__ == SETTINGS


class TrainingRows(IterableDataset[Rows]):
    """The rows of a run, batch by batch, in the order of our trainer; an epoch of it goes on where the last one ended.

    Args:
        global_rows: of a batch over all ranks.
    """

    def __init__(self, loader: Loader, global_rows: int, rank: int, world: int) -> None:
        self.loader, self.global_rows, self.rank, self.world = loader, global_rows, rank, world
        self.row = 0  # of the run, that the next batch begins with

    def __len__(self) -> int:
        return max(1, self.loader.rows_per_epoch // self.global_rows)

    def __iter__(self) -> Iterator[Rows]:
        done = self.row // self.global_rows % len(self)  # of this epoch, before a resume
        for _ in range(len(self) - done):
            batch = self.loader.batch(self.row, self.global_rows, self.rank, self.world)
            self.row += self.global_rows
            yield as_rows(batch)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int | str]:
        """Where the run is in the data."""
        return {"row": self.row, "data": self.loader.fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on from there.

        Raises:
            ConfigError: the data is not that of the checkpoint.
        """
        if state["data"] != self.loader.fingerprint:
            raise ConfigError("load_path: was trained on other data or with another tokenizer; restore them, or load "
                              "its weights alone: load_weights_only=True")  # fmt: skip
        self.row = int(state["row"])


class OnePass(IterableDataset[Rows]):
    """Every label of an evaluation's data once."""

    def __init__(self, loader: Loader, global_rows: int, rank: int, world: int) -> None:
        self.loader, self.global_rows, self.rank, self.world = loader, global_rows, rank, world

    def __len__(self) -> int:
        rows = self.loader.n_rows if self.loader.limit is None else min(self.loader.limit, self.loader.n_rows)
        return -(-rows // self.global_rows)

    def __iter__(self) -> Iterator[Rows]:
        return map(as_rows, self.loader.one_pass(self.global_rows, self.rank, self.world, self.loader.limit))


def as_rows(batch: Batch) -> Rows:
    """A batch as a mapping of the fields that it has."""
    return {name: part for name, part in batch._asdict().items() if part is not None}


def split_rows(batch: Rows, rows: int) -> list[Rows]:
    """Microbatches of at most so many rows, in order."""
    return [as_rows(micro) for micro in Batch(**batch).split(rows)]


def count_tokens(batch: Rows) -> dict[str, int]:
    """Tokens of a batch, and its labels, by which Composer weighs the losses of microbatches and ranks."""
    return {"total": batch["tokens"].numel(), "loss_generating": int((batch["labels"] != IGNORE).sum())}


def data_spec(dataset: IterableDataset[Rows]) -> DataSpec:
    """A `DataSpec` of rows, which counts labels and splits off microbatches."""
    return DataSpec(
        DataLoader(dataset, batch_size=None),
        split_batch=split_rows,
        get_num_samples_in_batch=lambda batch: len(batch["rows"]),
        get_num_tokens_in_batch=count_tokens,
    )


class ComposerParts(NamedTuple):
    """What `composer.Trainer` takes, under its names. The callers' own callbacks go beside `LLMFoundrySettings`."""

    model: ComposerCausalLM
    train_dataloader: DataSpec
    eval_dataloader: Evaluator | None
    optimizers: Optimizer
    schedulers: Callable[[State, float], float]
    algorithms: list[Algorithm]
    callbacks: list[Callback]
    max_duration: str
    eval_interval: str
    device_train_microbatch_size: int
    accumulate_train_batch_on_tokens: bool = True
    step_schedulers_every_batch: bool = True


def composer_parts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase | None = None, *, shard: bool = False
) -> ComposerParts:
    """The parts of a run for Composer's Trainer.

    Args:
        tokenizer: None: that of `config.tokenizer`.
        shard: spread the model by our `parallelize`, as `config.parallel` says; else Composer does (DDP, or FSDP2 with
            `parallelism_config` and FSDP_VERSION=2).

    Raises:
        ConfigError: a setting of the run cannot be had under Composer.
    """
    model_settings = config.model
    assert isinstance(model_settings, CausalLMConfig)
    model_settings.check_trainable()
    if shard:
        runtime.start(config.dist_timeout)
    dataset = config.train_loader.dataset
    tokenizer = tokenizer or config.tokenizer.build(dataset, [part.dataset for part in config.due_evaluations])
    special = config.tokenizer.special_tokens(tokenizer)
    documents = model_settings.attn_config.attn_uses_sequence_id

    def opened(part: LoaderConfig) -> Loader:
        return part.build(
            tokenizer, seed=config.seed, max_seq_len=config.max_seq_len, sequence_ids=documents, special=special
        )

    rank, world = runtime.rank(), runtime.world_size()
    if config.global_train_batch_size % world or config.device_eval_batch_size % world:
        raise ConfigError(
            f"global_train_batch_size={config.global_train_batch_size} and device_eval_batch_size="
            f"{config.device_eval_batch_size} must be multiples of the {world} ranks under Composer"
        )
    loader = opened(config.train_loader)
    timeline = Timeline.of(
        config.max_duration,
        rows_per_step=config.global_train_batch_size,
        tokens_per_row=loader.max_seq_len,
        rows_per_epoch=loader.rows_per_epoch,
    )
    model = _model(config, model_settings, shard)
    _load(config, model)
    micro = config.device_train_microbatch_size
    clipping = config.algorithms.gradient_clipping
    evaluator = None
    if config.eval_loader in config.due_evaluations and config.eval_loader is not None:
        rows = config.device_eval_batch_size
        evaluator = Evaluator(
            label="eval",
            dataloader=data_spec(OnePass(opened(config.eval_loader), rows, rank, world)),
            metric_names=["LanguageCrossEntropy"],
            subset_num_batches=config.eval_subset_num_batches,
            device_eval_microbatch_size=rows // world,
        )
    return ComposerParts(
        model=ComposerCausalLM(model, config.seed),
        train_dataloader=data_spec(TrainingRows(loader, config.global_train_batch_size, rank, world)),
        eval_dataloader=evaluator,
        optimizers=config.optimizer.build(model),
        schedulers=composer_schedule(config.scheduler.model_copy(update={"composer_step": False}).build(timeline)),
        algorithms=[GlobalNormClipping(clipping.clipping_threshold if clipping else None), RouterBalance()],
        callbacks=[LLMFoundrySettings(model_settings)],
        max_duration=f"{timeline.total_steps}ba",
        eval_interval=str(config.eval_interval),
        device_train_microbatch_size=config.global_train_batch_size // world if micro == "auto" else micro,
    )


def composer_schedule(schedule: Schedule) -> Callable[[State, float], float]:
    """A schedule as Composer calls it: before it counts the step, so that each factor comes a step late.

    Our trainer does the same with `scheduler.composer_step: true`.
    """

    def factor(state: State, ssr: float = 1.0) -> float:
        if ssr != 1.0:
            raise ConfigError("scale_schedule_ratio: a schedule of ours ends with max_duration; change that instead")
        return schedule.multiplier(int(state.timestamp.batch))

    return factor


def _model(config: RunConfig, settings: CausalLMConfig, shard: bool) -> CausalLM:
    """The model with its first weights, which are the same however it is spread."""
    if not shard:
        with torch.device("cpu"):
            model = settings.build()
        assert isinstance(model, CausalLM)
        init_weights(model, config.seed)
        return model.to(runtime.device())
    place = runtime.device()
    mesh = build_mesh(config.parallel, place.type, n_experts(settings))
    with torch.device("meta"):
        model = settings.build()
    assert isinstance(model, CausalLM)
    model = parallelize(model, mesh, config.parallel, config.precision_on(place.type))
    return materialize(model, config.parallel, config.seed)


def _load(config: RunConfig, model: CausalLM) -> None:
    """Fill in the weights of `load_path`: a checkpoint of ours, or a Hugging Face one."""
    path = config.load_path
    if path is None:
        return
    if path.startswith(HUGGING_FACE):
        load_weights(model, path.removeprefix(HUGGING_FACE), allow=config.load_allow)
        return
    if not config.load_weights_only:
        raise ConfigError(
            f"load_path: {path}: Composer cannot take up a run of ours, only begin from its weights: "
            "load_weights_only=true; a checkpoint that Composer saved goes to its Trainer's own load_path"
        )
    contents = read(path)
    saved = contents.config["model"]
    assert isinstance(saved, dict)
    _check_same(str(contents.path), saved, model.config)
    load_model_only(contents, model)


def _check_same(where: str, saved: dict[str, object], config: CausalLMConfig) -> None:
    """Refuse weights of a model that computes something else."""
    for key, (before, now) in weight_differences(model_config(saved, f"{where}: model"), config).items():
        raise ConfigError(f"model.{key}: is {now!r}, but {before!r} in {where}")


def _is_unit(module: nn.Module) -> bool:
    """What Composer's FSDP2 gathers together: a block at a time, and the rest."""
    return isinstance(module, Block | CausalLM)


def _inner(model: nn.Module) -> ComposerCausalLM:
    """Our model inside DDP."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, ComposerCausalLM)
    return inner
