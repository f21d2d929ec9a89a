"""Metadata and extras; pyproject.toml holds the tools' settings.

Lower bounds are versions that the tests were run with, not guesses.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """``__version__`` of the package, without importing it (that would need its dependencies)."""
    source = (ROOT / "rtdmd" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError("rtdmd/__init__.py states no __version__")
    return match.group(1)


OCR = ["rapidocr>=3.10", "onnxruntime>=1.32"]
CARD = ["matplotlib>=3.11"]  # the curves on an exported model's card

setup(
    name="rtdmd",
    version=read_version(),
    description="Reward-Tilted Distribution Matching Distillation of text-to-image models on DeepSpeed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["rtdmd", "rtdmd.*"]),
    python_requires=">=3.11",  # diffusers 0.42 and transformers 5.23 ask for it
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.42",
        "transformers>=5.23",
        "peft>=0.21",
        "accelerate>=1.15",
        "datasets>=5.2",
        "pyarrow>=26",
        "safetensors>=0.8",
        "sentencepiece>=0.2.3",  # T5's tokenizer, for pipelines that ship no tokenizer.json
        "numpy>=2.4",
        "scipy>=1.17",  # transformers' Mask2Former (geneval) is not built without it
        "pillow>=13",
        "psutil>=7",
        "pyyaml>=6.0.3",
        "tqdm>=4.70",
    ],
    extras_require={
        "train": ["deepspeed>=0.19.8"],
        "ocr": OCR,
        "rewards": OCR,  # the other rewards need nothing beyond torch and transformers
        "card": CARD,
        "tracking": ["tensorboard>=2.21", "wandb>=0.31"],
        "dev": [
            *CARD,
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17.6,<0.18",
            "mypy>=2.4.1,<2.5",
            "types-PyYAML>=6.0.12",
            "pre-commit>=4.7",
        ],
    },
    entry_points={"console_scripts": ["rtdmd=rtdmd.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
