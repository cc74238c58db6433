"""Package metadata and dependencies; the settings of the tools are in pyproject.toml.

torch is named with a floor only. Install the build that fits the machine first (`make setup` does:
`pip install torch==X.Y.Z`, then `pip install -e .[dev]`), so that this floor never pulls another one.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="llmfoundry",
    version="0.1.0",
    description="Training of decoder-only language models with dropless mixture-of-experts layers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["llmfoundry", "llmfoundry.*"]),
    package_data={"llmfoundry": ["schema.json"], "llmfoundry.report": ["assets/*"], "llmfoundry.cli": ["assets/*"]},
    entry_points={"console_scripts": ["llmfoundry = llmfoundry.cli.main:run"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "filelock>=3.12",
        "omegaconf>=2.3",
        "pyyaml>=6.0",
        "pydantic>=2.7",
        "transformers>=5.0",
        "datasets>=3",
        "fsspec>=2024.6",
        "tokenizers>=0.22",
        "pyarrow>=17",
        "zstandard>=0.22",
        "safetensors>=0.5",
        "rich>=13",
        "click>=8.1",
        "wandb>=0.19",
        "tensorboard>=2.18",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.7",
            "ruff>=0.12",
            "mypy>=1.15",
            "peft>=0.17",
            "gguf>=0.18",
            "trl>=1.0",
            "cramjam>=2.8",
            "hypothesis>=6.100",
            # An S3 server on loopback. Not moto[server]: its antlr4 is another than omegaconf's.
            "s3fs>=2024.6",
            "moto[s3]>=5",
            "flask>=3",
            "flask-cors>=4",
        ],
        "s3": ["s3fs>=2024.6"],  # s3:// paths of data and checkpoints; gs:// needs gcsfs, hf:// nothing more
        "mds": ["cramjam>=2.8"],  # MDS shards compressed by Brotli or Snappy
        "gguf": ["gguf>=0.18"],  # llama.cpp's files in
        "lm-eval": ["lm-eval>=0.4.13"],  # eval.py --tasks
        # For a torch that came without Triton (CPU builds): the kernels' tests then run in Triton's
        # interpreter, which fails on numpy >= 2.4. A CUDA build of torch brings its own Triton.
        "triton": ['triton==3.6.0; sys_platform == "linux"', "numpy<2.4"],
    },
)
