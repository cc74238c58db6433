"""What a plan needs to know about a run, and each GPU's part of its work."""

from __future__ import annotations

from typing import Literal, NamedTuple

from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.all_gather import gathers
from llmfoundry.moe.balance import Balance
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.mesh import Degrees, ParallelConfig, plan_mesh, settled_exchange
from llmfoundry.planning import hardware
from llmfoundry.train.config import Precision, RunConfig
from llmfoundry.train.loss import CrossEntropyConfig, LossConfig
from llmfoundry.train.microbatch import Microbatches
from llmfoundry.train.optim import OptimizerConfig


class Work(NamedTuple):
    """One GPU's share of a step."""

    rows: int
    micro_rows: int  # of one forward
    seq_len: int
    counts_loads: bool = False  # whether the balance loss needs a pass that counts loads, before the first backward

    @property
    def microbatches(self) -> int:
        """Number of microbatches per step."""
        return -(-self.rows // self.micro_rows)

    @property
    def counted(self) -> int:
        """Number of microbatches whose loads are counted first, by a forward without gradients and without the head."""
        return self.microbatches - 1 if self.counts_loads else 0


class Job(NamedTuple):
    """A run, without its mesh."""

    model: CausalLMConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    precision: Precision
    global_rows: int  # sequences: a pair of preferences is two
    micro_rows: int | Literal["auto"]
    seq_len: int
    loss: LossConfig = CrossEntropyConfig()

    @classmethod
    def of(cls, config: RunConfig) -> Job:
        """Return the job of a YAML's run on GPUs."""
        assert isinstance(config.model, CausalLMConfig)
        sequences, micro = _sequences(config.loss), config.device_train_microbatch_size
        return cls(
            config.model,
            config.parallel,
            config.optimizer_on("cuda"),
            config.precision_on("cuda"),
            config.global_train_batch_size * sequences,
            micro if micro == "auto" else micro * sequences,
            config.max_seq_len,
            config.loss,
        )

    @property
    def compute_bytes(self) -> int:
        """Bytes per activation value."""
        return 4 if self.precision == "fp32" else 2

    @property
    def sequences(self) -> int:
        """Number of sequences per example."""
        return _sequences(self.loss)

    def check_rows(self, degrees: Degrees) -> None:
        """Refuse numbers of rows that a run refuses.

        Raises:
            ConfigError: if a rank has no rows, or ranks have different numbers of microbatches.
        """
        micro = self.micro_rows if self.micro_rows == "auto" else self.micro_rows // self.sequences
        Microbatches(micro, self.global_rows // self.sequences, degrees.replicate * degrees.shard)

    def degrees(self, gpus: int) -> Degrees:
        """Return the mesh of the YAML on this many GPUs.

        Raises:
            ConfigError: if the mesh does not fit the GPUs or the model.
        """
        return plan_mesh(self.parallel, gpus, n_experts(self.model))

    def work(self, degrees: Degrees) -> Work:
        """Return one GPU's part of a step."""
        rows = self.sequences * -(-self.global_rows // self.sequences // (degrees.replicate * degrees.shard))
        balance = Balance.of(self.model)
        counts = balance is not None and balance.loss_weight > 0 and balance.counts_ahead
        return Work(rows, rows if self.micro_rows == "auto" else min(self.micro_rows, rows), self.seq_len, counts)

    def on(self, degrees: Degrees) -> Job:
        """Return the job with the keys of `parallel` that a run on this mesh has.

        Raises:
            ConfigError: as `settled_exchange`.
        """
        parallel = self.changed(**degrees._asdict()).parallel
        return self._replace(parallel=settled_exchange(parallel, self.global_rows, degrees.replicate * degrees.shard))

    def gathers(self, degrees: Degrees, top_k: int) -> bool:
        """Return whether the ranks that divide the experts gather all tokens, instead of sending each where needed."""
        way = self.on(degrees).parallel.exchange_tokens
        return gathers(way, degrees.expert, top_k, hardware.NODE % degrees.expert == 0)

    def changed(self, **parallel: object) -> Job:
        """Return a copy with other values of keys of `parallel`."""
        return self._replace(parallel=self.parallel.model_copy(update=parallel))


def _sequences(loss: LossConfig) -> int:
    return 2 if loss.pairs else 1
