import re
from pathlib import Path

from setuptools import find_packages, setup

package = Path(__file__).parent / "pangu_ms" / "__init__.py"
version = re.search(r'^__version__ = "(.+)"$', package.read_text(encoding="utf-8"), re.MULTILINE)[1]

setup(
    name="pangu_ms",
    version=version,
    description="openPangu-2.0 on MindSpore",
    license="Apache-2.0",
    packages=find_packages(include=["pangu_ms", "pangu_ms.*"]),
    python_requires=">=3.10,<3.12",
    install_requires=[
        "mindspore==2.9.0",
        "mindformers==1.9.0",
        "numpy<2",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "tqdm>=4.65",
    ],
    extras_require={
        "test": ["pytest>=8", "hypothesis>=6"],
        "plot": ["matplotlib>=3.7"],
    },
    entry_points={
        "console_scripts": [
            "pangu-generate = pangu_ms.generation.command:main",
            "pangu-convert = pangu_ms.checkpoint.convert:main",
        ],
    },
)
