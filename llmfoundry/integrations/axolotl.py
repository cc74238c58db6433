"""An axolotl plugin that adds llmfoundry's experts: `experts_implementation: llmfoundry` in its YAML.

axolotl passes that key to `transformers`, which only knows implementations that have been registered.
"""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin

import llmfoundry.drop_in  # noqa: F401  registers the experts


class Experts(BasePlugin):
    """The plugin: `plugins: [llmfoundry.integrations.axolotl.Experts]`. Importing it is enough."""
