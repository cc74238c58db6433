"""Show which expert receives which token of a text, by layer: as text, JSON or an HTML page.

Shapes: L MoE layers, T tokens of the text, E experts, K top_k.
"""

from __future__ import annotations

import colorsys
import html
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import NamedTuple

import torch
from rich.console import Console
from rich.style import Style
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmfoundry.model.transformer import CausalLM
from llmfoundry.report.experts import mixture_layers, pieces, route

GOLDEN = 0.618034  # fraction of the color circle between consecutive experts, so that neighbors differ most
VISIBLE = str.maketrans({"\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"})
COLOURS = ("truecolor", "256", "windows")  # of rich; other terminals have too few colors to distinguish experts


class Xray(NamedTuple):
    """A text and its routing."""

    ids: list[int]  # (T,)
    texts: list[str]  # (T,) which together form the text
    layers: list[int]  # (L,) layer indices in the model
    n_experts: int
    experts: Tensor  # (L, T, K) int16, best first
    weights: Tensor  # (L, T, K) float32


def xray(model: CausalLM, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Xray:
    """Route a text; all ranks call it with the same text. Stretches of `max_seq_len` tokens are read separately.

    Args:
        model: a model with MoE layers.
        ids: (T,) the text's tokens, at least one.
    """
    place, length = next(model.parameters()).device, model.config.max_seq_len
    found = [
        route(model, torch.tensor([ids[start : start + length]], device=place)) for start in range(0, len(ids), length)
    ]
    layers = mixture_layers(model.config)
    return Xray(
        list(ids),
        pieces(ids, tokenizer),
        layers,
        model.config.ffn(layers[0]).moe_num_experts,  # type: ignore[attr-defined]
        torch.cat([routing.experts for routing in found], 1),
        torch.cat([routing.weights for routing in found], 1),
    )


def show(found: Xray, layers: Iterable[int], console: Console) -> None:
    """Print the text once per layer, with each token in the color of its first expert.

    Without colors, `[3 5]` after a token names its experts.
    """
    coloured = console.color_system in COLOURS and not console.no_color
    for layer in layers:
        taken = found.experts[found.layers.index(layer)].tolist()  # (T, K)
        text = Text()
        for token, experts in zip(found.texts, taken, strict=True):
            if coloured:
                text.append(token, Style(color="black", bgcolor=colour(experts[0])) if token.strip() else "")
            else:
                text.append(f"{token.translate(VISIBLE)}[{' '.join(map(str, experts))}]")
        console.print(Text(f"layer {layer}", "bold"))
        console.print(text)
        counts = Counter(expert for experts in taken for expert in experts)
        console.print(Text("  ").join(_legend(counts, coloured)))
        console.print()


def _legend(counts: Counter[int], coloured: bool) -> Iterable[Text]:
    """Return the experts that receive tokens, with the number of tokens."""
    for expert, n in sorted(counts.items()):
        style = Style(color="black", bgcolor=colour(expert)) if coloured else ""
        yield Text(f"expert {expert}", style).append(f": {n}", "")


def colour(expert: int) -> str:
    """Return a light color, as #rrggbb; experts with consecutive numbers get different ones."""
    red, green, blue = colorsys.hls_to_rgb(expert * GOLDEN % 1, 0.72 + 0.08 * (expert % 2), 0.75)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def as_json(found: Xray, layers: Iterable[int]) -> dict[str, object]:
    """Plain data: the tokens and, by layer, each token's experts with their weights, highest first."""
    by_layer = []
    for layer in layers:
        at = found.layers.index(layer)
        weights = [[round(weight, 5) for weight in of_token] for of_token in found.weights[at].tolist()]
        by_layer.append({"layer": layer, "experts": found.experts[at].tolist(), "weights": weights})
    tokens = [{"id": token, "text": text} for token, text in zip(found.ids, found.texts, strict=True)]
    return {"n_experts": found.n_experts, "tokens": tokens, "layers": by_layer}


def page(found: Xray, layers: Iterable[int], title: str) -> str:
    """Return the same as one HTML file that needs neither a server nor a network."""
    data = as_json(found, layers) | {"colours": [colour(expert) for expert in range(found.n_experts)]}
    assets = files("llmfoundry.report") / "assets"
    text = {name: (assets / name).read_text(encoding="utf-8") for name in ("xray.html", "page.css", "xray.js")}
    # A text that contains </script> must not end the element.
    encoded = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("</", "<\\/")
    return (
        text["xray.html"]
        .replace("TITLE", html.escape(title), 2)
        .replace("/*CSS*/", text["page.css"])
        .replace("/*PAGE*/", text["xray.js"])
        .replace("/*DATA*/", encoded)  # last, so that nothing in a text is replaced
    )
