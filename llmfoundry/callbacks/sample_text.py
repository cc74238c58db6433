"""`sample_text`: at the end, prints a text by the model, and its bits per byte beside those of gzip and xz."""

from __future__ import annotations

import gzip
import lzma
from typing import NamedTuple

from pydantic import Field

from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.data.sources import DatasetConfig
from llmfoundry.eval.generate import encoded, generate
from llmfoundry.train.callback import Callback, CallbackConfig, Run

COMPRESS_BYTES = 2**26  # xz -9 takes about half a minute for this much


class SampleTextConfig(CallbackConfig, names=("sample_text",)):
    """What to write; sampling uses the run's seed."""

    prompt: str = "def "  # the text to continue
    max_new_tokens: int = Field(120, ge=1)  # maximum tokens of the sample
    temperature: float = Field(0.8, ge=0)  # sampling temperature; 0: greedy decoding
    top_p: float = Field(0.95, gt=0, le=1)  # sample from the most likely tokens that together have this probability
    compressors: bool = True  # also compress the validation text, at most its first 64 MiB, for comparison

    def build(self) -> SampleText:
        return SampleText(self)


class SampleText(Callback):
    """Prints to the console. Every rank generates, because the forward of a sharded model is collective."""

    def __init__(self, config: SampleTextConfig) -> None:
        self.config = config

    def fit_end(self, trainer: Run) -> None:
        text = self._sample(trainer)
        if not runtime.is_rank0():
            return
        print(f"\n--- a sample ---\n{text}\n--- end of sample ---\n")
        bits = trainer.evaluation.get("metrics/eval/bits_per_byte")
        if bits is not None and self.config.compressors and trainer.config.eval_loader is not None:
            try:
                print(_compressed(trainer.config.eval_loader.dataset))
            except (ConfigError, OSError) as error:  # the run is done; files that have disappeared must not fail it
                print(f"no comparison with gzip and xz: {error}")
            print(f"{'this model':>10}: {bits:.4f}")

    def _sample(self, trainer: Run) -> str:
        config = self.config
        return "".join(
            written(
                trainer,
                config.prompt,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
            )
        )


class Written(NamedTuple):
    """A text that the model wrote."""

    prompt: str  # decoded from its tokens
    continuation: str


def written(
    trainer: Run, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, top_k: int = 0
) -> Written:
    """Continue a prompt up to max_seq_len, with the run's seed. All ranks call this."""
    n_prompt = len(encoded(trainer.tokenizer, prompt, trainer.special))
    room = trainer.config.max_seq_len - n_prompt
    if room < 1:
        why = f"(none: the prompt has {n_prompt} tokens, and max_seq_len is {trainer.config.max_seq_len})"
        return Written("", why)
    pieces: list[str] = []
    generate(
        trainer.model,
        trainer.tokenizer,
        prompt,
        max_new_tokens=min(max_new_tokens, room),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=trainer.config.seed,
        special=trainer.special,
        emit=pieces.append,
    )
    return Written(pieces[0], "".join(pieces[1:]))


def _compressed(dataset: DatasetConfig) -> str:
    """Return the bits per byte to which two compressors reduce the validation text, one line each."""
    data = dataset.build().text_bytes(limit=COMPRESS_BYTES + 1)
    part = "the validation text"
    if len(data) > COMPRESS_BYTES:
        data, part = data[:COMPRESS_BYTES], f"the first {COMPRESS_BYTES:,} bytes of the validation text"
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "xz -9": len(lzma.compress(data, preset=9))}
    return "\n".join(f"{name:>10}: {8 * size / len(data):.4f} bits per byte of {part}" for name, size in sizes.items())
