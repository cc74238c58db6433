"""`sample_text`: at the end, show what the model writes and how its bits a byte stand beside gzip and xz."""

from __future__ import annotations

import gzip
import lzma
from typing import TYPE_CHECKING

from pydantic import Field

from llmfoundry import runtime
from llmfoundry.eval.generate import generate
from llmfoundry.train.callback import Callback, CallbackConfig

if TYPE_CHECKING:
    from llmfoundry.train.trainer import Trainer


class SampleTextConfig(CallbackConfig, names=("sample_text",)):
    """What is written; the seed is the run's."""

    prompt: str = "def "
    max_new_tokens: int = Field(120, ge=1)
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    compressors: bool = True  # compress the validation text too; reads all of it

    def build(self) -> SampleText:
        return SampleText(self)


class SampleText(Callback):
    """Prints to the console. Every rank generates, for the forward of a sharded model is collective."""

    def __init__(self, config: SampleTextConfig) -> None:
        self.config = config

    def fit_end(self, trainer: Trainer) -> None:
        config = self.config
        text = generate(
            trainer.model,
            trainer.tokenizer,
            config.prompt,
            max_new_tokens=min(config.max_new_tokens, trainer.config.max_seq_len - 16),
            temperature=config.temperature,
            top_p=config.top_p,
            seed=trainer.config.seed,
        )
        if not runtime.is_rank0():
            return
        print(f"\n--- a sample ---\n{text}\n--- end of sample ---\n")
        bits = trainer.evaluation.get("metrics/eval/bits_per_byte")
        if bits is not None and config.compressors and trainer.eval_loader is not None:
            data = trainer.eval_loader.text_bytes()
            for name, size in (
                ("gzip -9", len(gzip.compress(data, 9))),
                ("xz -9", len(lzma.compress(data, preset=9))),
            ):
                print(f"{name:>10}: {8 * size / len(data):.4f} bits a byte of the validation text")
            print(f"{'this model':>10}: {bits:.4f}")
