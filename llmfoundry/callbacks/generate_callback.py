"""`generate_callback`: continues some prompts during training. The keys are Composer's.

    callbacks:
      generate_callback: {prompts: ["The answer is"], interval: 500ba, max_new_tokens: 40, do_sample: true}

Each time, loggers get a table `generations`, and `save_folder/generations.jsonl` gets a line for each prompt.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated

from pydantic import Field

from llmfoundry import runtime
from llmfoundry.atomic import append_line
from llmfoundry.callbacks.sample_text import written
from llmfoundry.train.callback import AtIntervals, CallbackConfig, Run, Table
from llmfoundry.train.duration import Interval

log = logging.getLogger(__name__)

FILE = "generations.jsonl"


class GenerateConfig(CallbackConfig, names=("generate_callback",)):
    """The prompts, and when and how they are continued. Sampling uses the run's seed."""

    prompts: Annotated[list[str], Field(min_length=1)]  # the texts to continue
    interval: Interval  # interval between generations; also generates after the last step
    batch_size: int | None = Field(None, ge=1)  # accepted, without effect: prompts are continued one at a time
    max_new_tokens: int = Field(20, ge=1)  # maximum tokens per continuation
    do_sample: bool = False  # false: greedy decoding
    temperature: float = Field(1.0, gt=0)  # sampling temperature; lower is less random
    top_p: float = Field(1.0, gt=0, le=1)  # sample from the most likely tokens that together have this probability
    top_k: int | None = Field(None, ge=0)  # sample from this many of the most likely tokens; null or 0: from all
    use_cache: bool = True  # accepted, without effect: the cache is always used

    def build(self) -> GenerateCallback:
        return GenerateCallback(self)


class GenerateCallback(AtIntervals):
    """Every rank generates, because the forward of a sharded model is collective; rank 0 writes."""

    def __init__(self, config: GenerateConfig) -> None:
        super().__init__(config.interval)
        self.config = config

    def act(self, trainer: Run) -> None:
        config = self.config
        rows = []
        for prompt in config.prompts:
            text = written(
                trainer,
                prompt,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature if config.do_sample else 0.0,
                top_p=config.top_p,
                top_k=config.top_k or 0,
            )
            rows.append([prompt, text.continuation])
        trainer.log_table(Table("generations", ["prompt", "generation"], rows))
        if not runtime.is_rank0():
            return
        path = trainer.config.folder / FILE
        try:
            for prompt, text_after in rows:
                line = {"step": trainer.state.step, "prompt": prompt, "generation": text_after}
                append_line(path, json.dumps(line, ensure_ascii=False))
        except OSError as error:
            log.warning("%s cannot be written: %s; training continues", path, error.strerror)
