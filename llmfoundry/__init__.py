"""Train mixture-of-experts language models with PyTorch.

`from llmfoundry import MoE` gives the MoE layer by itself; `import llmfoundry.drop_in` registers our experts with
`transformers`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmfoundry.standalone.moe import MoE, MoEOutput

__all__ = ["MoE", "MoEOutput"]


def _warn_of_namesake() -> None:
    """Warn of an installed `llm-foundry`, whose package is called llmfoundry too."""
    for folder in dict.fromkeys(sys.path):
        for found in Path(folder).glob("llm_foundry-*.dist-info"):
            warnings.warn(
                f"{found}: LLM Foundry is installed too, and its package has the same name; this is {__file__}. "
                "pip uninstall llm-foundry, or give each an environment of its own",
                stacklevel=3,
            )


_warn_of_namesake()


def __getattr__(name: str) -> object:
    if name in __all__:  # torch is imported with the layer, not with the package: commands answer `--help` at once
        from llmfoundry.standalone import moe

        return getattr(moe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
