"""A plugin for axolotl that makes our experts selectable: `experts_implementation: llmfoundry` in its YAML.

axolotl passes that key to `transformers`, which only has the implementations that were registered before.
"""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin

import llmfoundry.drop_in  # noqa: F401  registers our experts


class Experts(BasePlugin):
    """`plugins: [llmfoundry.integrations.axolotl.Experts]`; the import is all it does."""
