"""Data, in the order it flows: sources (text_files > files, tables, split) > tokenizer > packing > rows
(mixture > interleave) > loader."""

from llmfoundry.data.loader import IGNORE, Batch, Loader, LoaderConfig, TextLoaderConfig
from llmfoundry.data.mixture import MixtureConfig
from llmfoundry.data.packing import TokenStream, pack, prepare
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
    "DatasetConfig",
    "Loader",
    "LoaderConfig",
    "MixtureConfig",
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
