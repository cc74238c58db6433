"""Train mixture-of-experts language models with PyTorch.

`from llmfoundry import MoE` is the mixture layer by itself; `import llmfoundry.drop_in` gives `transformers` our
experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmfoundry.standalone.moe import MoE, MoEOutput

__all__ = ["MoE", "MoEOutput"]


def __getattr__(name: str) -> object:
    if name in __all__:  # torch is imported with the layer, not with the package: commands answer `--help` at once
        from llmfoundry.standalone import moe

        return getattr(moe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
