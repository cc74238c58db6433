"""The likelihood of given continuations, and greedy or sampled continuations of many prompts.

Rows are sorted by length, dealt to the ranks in turn and padded on the right, which changes nothing for a causal model.
Every rank runs the same number of forwards, because ranks that share experts or sharded weights must meet in each; a
rank with no row left runs one on a single token. Results are summed over the ranks, so each rank has all of them.

Shapes: N continuations, B rows of a forward, S tokens, J continuation tokens of a forward, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.data.rows import IGNORE
from llmfoundry.eval.generate import check_ids, room
from llmfoundry.model.transformer import Cache, CausalLM
from llmfoundry.moe.layer import MoEConfig


class Continuation(NamedTuple):
    """Token ids of which the last `n` are judged, each given the ids before it; n is less than their number."""

    ids: list[int]
    n: int


class Likelihood(NamedTuple):
    """Results for N continuations, each (N,) float64 on the CPU; the same on every rank."""

    nats: Tensor  # summed over the tokens
    greedy: Tensor  # 1 if every token is the likeliest at its position, else 0
    lowest_top: Tensor  # the lowest, over positions, of the probability of the likeliest token
    mean: Tensor  # mean probability of the tokens


class Ranks(NamedTuple):
    """This process's share of the rows, and the number of rows in a forward."""

    rows: int  # rows per forward
    rank: int = 0
    world: int = 1
    stopped: Callable[[], bool] = lambda: False  # called before each forward; must return the same on every rank


@torch.no_grad()
def likelihood(model: CausalLM, continuations: Sequence[Continuation], ranks: Ranks) -> Likelihood | None:
    """Compute the likelihood of continuations.

    Args:
        model: in evaluation mode, sharded or not; every rank calls this.

    Returns:
        The same on every rank; None if it was stopped.

    Raises:
        ConfigError: if a token has no row in the embedding, or a row has more tokens than the model has learned
            positions.
    """
    place = next(model.parameters()).device
    found = torch.zeros(len(Likelihood._fields), len(continuations), dtype=torch.float64, device=place)
    check_rows(model, [item.ids for item in continuations], 0)
    for numbers in _batches([len(item.ids) for item in continuations], ranks):
        if ranks.stopped():
            return None
        items = [continuations[number] for number in numbers] or [Continuation([0, 0], 1)]
        tokens = _padded(items).to(place)  # (B, S)
        length = tokens.shape[1]
        at = [row * length + len(item.ids) - 1 - i for row, item in enumerate(items) for i in range(item.n, 0, -1)]
        logits = model(tokens, at=torch.tensor(at, device=place)).logits[0].float()  # (J, V)
        targets = torch.tensor([token for item in items for token in item.ids[-item.n :]], device=place)  # (J,)
        log_p = logits.log_softmax(-1)
        nats = -log_p.gather(1, targets[:, None])[:, 0]  # (J,)
        top, best = log_p.max(-1)
        first = 0
        for number, item in zip(numbers, items, strict=False):  # drops the dummy row of a rank without rows
            own = slice(first, first + item.n)
            first += item.n
            hit = (best[own] == targets[own]).all()
            values = nats[own].double().sum(), hit, top[own].min().exp(), (-nats[own]).exp().mean()
            found[:, number] = torch.stack([value.double() for value in values])
    return Likelihood(*runtime.all_reduce_sum(found).cpu())


@torch.no_grad()
def nats_of(model: CausalLM, continuations: Sequence[Continuation], ranks: Ranks) -> Tensor | None:
    """Return `Likelihood.nats`, (N,) float64, for long continuations: no logits are kept.

    Args and errors as for `likelihood`.
    """
    place = next(model.parameters()).device
    found = torch.zeros(len(continuations), dtype=torch.float64, device=place)
    check_rows(model, [item.ids for item in continuations], 0)
    for numbers in _batches([len(item.ids) for item in continuations], ranks):
        if ranks.stopped():
            return None
        items = [continuations[number] for number in numbers] or [Continuation([0, 0], 1)]
        tokens = _padded(items)  # (B, S)
        labels = torch.full_like(tokens, IGNORE)  # (B, S)
        for row, item in enumerate(items):
            end = len(item.ids) - 1
            labels[row, end - item.n : end] = torch.tensor(item.ids[-item.n :])
        nats = model(tokens.to(place), labels.to(place)).nats.double().sum(1)  # (B,)
        found[numbers] = nats[: len(numbers)]
    return runtime.all_reduce_sum(found).cpu()


def _padded(items: Sequence[Continuation]) -> Tensor:
    """Return all tokens of each row but the last, which is judged and not read: (B, S) int64."""
    tokens = torch.zeros(len(items), max(len(item.ids) for item in items) - 1, dtype=torch.int64)
    for row, item in enumerate(items):
        tokens[row, : len(item.ids) - 1] = torch.tensor(item.ids[:-1])
    return tokens


# Chooses an id for each of n rows, given the indices of their prompts and (n, V) logits; n may be 0.
Draw = Callable[[list[int], Tensor], list[int]]


def _likeliest(numbers: list[int], logits: Tensor) -> list[int]:
    return logits.argmax(-1).tolist()


class Prompt(NamedTuple):
    """Token ids to continue, and the maximum number of new tokens."""

    ids: list[int]  # at least one
    max_new_tokens: int


@torch.no_grad()
def continue_all(
    model: CausalLM,
    prompts: Sequence[Prompt],
    ranks: Ranks,
    *,
    stop: Collection[int],
    done: Callable[[int, list[int]], bool] = lambda number, ids: False,
    draw: Draw = _likeliest,
) -> list[list[int]] | None:
    """Continue prompts, greedily or by sampling, until a stop token, `max_new_tokens`, or `done`.

    Rows of different lengths are padded on the left, and the result is the same as for each row alone. Modules of
    `transformers` do not support that here: their rows are read up to the end of the shortest one, and from there token
    by token, with a longer row's own tokens first. If experts of limited capacity drop tokens, each row has its own
    forward.

    Args:
        model: in evaluation mode, sharded or not; every rank calls this.
        stop: ids that end a text and are not part of it.
        done: whether a text is complete, given the number of its prompt and its new ids.

    Returns:
        The new ids of each prompt, the same on every rank; None if it was stopped.

    Raises:
        ConfigError: as for `likelihood`.
    """
    place = next(model.parameters()).device
    if isinstance(model.config.ffn_config, MoEConfig) and model.config.ffn_config.moe_capacity_factor:
        ranks = ranks._replace(rows=1)
    longest = max((prompt.max_new_tokens for prompt in prompts), default=0)
    check_rows(model, [prompt.ids for prompt in prompts], longest)
    written = torch.zeros(len(prompts), longest, dtype=torch.int64, device=place)  # ids + 1; 0: no token
    for numbers in _batches([len(prompt.ids) for prompt in prompts], ranks):
        if ranks.stopped():
            return None
        texts = _write(model, [(number, prompts[number]) for number in numbers], stop, done, draw)
        for number, text in zip(numbers, texts, strict=True):
            written[number, : len(text)] = torch.tensor(text, dtype=torch.int64, device=place) + 1
    return [[token - 1 for token in row if token] for row in runtime.all_reduce_sum(written).tolist()]


def _write(
    model: CausalLM,
    prompts: list[tuple[int, Prompt]],
    stop: Collection[int],
    done: Callable[[int, list[int]], bool],
    draw: Draw,
) -> list[list[int]]:
    """Return the new ids of the prompts of one batch. The batch may be empty on this rank and not on others."""
    place = next(model.parameters()).device
    rows = [list(prompt.ids) for _, prompt in prompts] or [[0]]
    texts: list[list[int]] = [[] for _ in prompts]
    active = {row for row, (_, prompt) in enumerate(prompts) if prompt.max_new_tokens > 0}
    padding = [max(map(len, rows)) - len(row) for row in rows]
    if model.own_blocks and any(padding):
        rows = [[0] * n + row for n, row in zip(padding, rows, strict=True)]
        cache = Cache(model.config.n_layers, padding=torch.tensor(padding, device=place))
    else:
        cache = Cache(model.config.n_layers)
    read, end = 0, min(map(len, rows))
    while runtime.any_rank(bool(active)):
        fresh = torch.tensor([row[read:end] for row in rows], device=place)  # (B, S) tokens not in the cache
        logits = model(fresh, cache=cache, last_only=True).logits[:, -1]  # (B, V)
        read, end = end, end + 1
        writing = [row for row in sorted(active) if len(rows[row]) == read]  # the others still read their prompts
        drawn = draw([prompts[row][0] for row in writing], logits[writing])
        for row, token in zip(writing, drawn, strict=True):
            number, prompt = prompts[row]
            rows[row].append(token)
            if token not in stop:
                texts[row].append(token)
            if token in stop or len(texts[row]) == prompt.max_new_tokens or done(number, texts[row]):
                active.remove(row)
        for ids in rows:
            ids.extend([0] * (end - len(ids)))  # pads texts that have ended
        if not active and model.config.has_learned_positions and end > model.config.max_seq_len:
            # Other ranks are still writing; continue with a dummy row that has positions left.
            rows, cache, read, end = [[0]], Cache(model.config.n_layers), 0, 1
    return texts


def check_rows(model: CausalLM, rows: Sequence[list[int]], max_new_tokens: int) -> None:
    """Refuse rows that the model cannot read; raise ConfigError."""
    config = model.config
    check_ids(max((max(ids) for ids in rows), default=0), config.vocab_size)
    longest = max(map(len, rows), default=0)
    if max_new_tokens > room(config, longest):
        raise ConfigError(
            f"a text of {longest + max_new_tokens - 1} tokens is longer than the {config.max_seq_len} positions that "
            "the model has learned "
            "(model.max_seq_len); lower icl_seq_len, or take fewer examples (num_fewshot)"
        )


def _batches(lengths: Sequence[int], ranks: Ranks) -> Iterator[list[int]]:
    """Yield the indices of this rank's rows in batches, longest first. Each rank gets as many batches, some empty."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    own = order[ranks.rank :: ranks.world]
    most = -(-len(order) // ranks.world)  # rows on the rank with the most
    for start in range(0, most, ranks.rows):
        yield own[start : start + ranks.rows]
