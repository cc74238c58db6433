"""Data, in the order it flows: sources (text_files > files, tables, split) > tokenizer > packing > rows
(mixture > interleave) > loader."""

from llmfoundry.data.chats import ChatsConfig
from llmfoundry.data.hub import HubTextConfig
from llmfoundry.data.id_rows import IdsConfig
from llmfoundry.data.loader import Batch, Loader, LoaderConfig, TextLoaderConfig
from llmfoundry.data.mds_rows import MDSConfig
from llmfoundry.data.megatron_rows import MegatronConfig
from llmfoundry.data.mixture import MixtureConfig
from llmfoundry.data.packing import TokenStream, pack, prepare
from llmfoundry.data.preferences import PreferencesConfig
from llmfoundry.data.rows import IGNORE
from llmfoundry.data.sources import (
    DatasetConfig,
    PythonStdlibConfig,
    Source,
    SyntheticConfig,
)
from llmfoundry.data.text_files import TextFilesConfig
from llmfoundry.data.tokenizer import TokenizerConfig

__all__ = [
    "IGNORE",
    "Batch",
    "ChatsConfig",
    "DatasetConfig",
    "HubTextConfig",
    "IdsConfig",
    "Loader",
    "LoaderConfig",
    "MDSConfig",
    "MegatronConfig",
    "MixtureConfig",
    "PreferencesConfig",
    "PythonStdlibConfig",
    "Source",
    "SyntheticConfig",
    "TextFilesConfig",
    "TextLoaderConfig",
    "TokenStream",
    "TokenizerConfig",
    "pack",
    "prepare",
]
