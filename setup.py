import re
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

package = Path(__file__).parent / "pangu_ms" / "__init__.py"
version = re.search(r'^__version__ = "(.+)"$', package.read_text(encoding="utf-8"), re.MULTILINE)[1]

FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]


class BuildIfPossible(build_ext):
    """The compiled operators make the CPU faster and are never needed: without a C++ compiler they are left out."""

    def build_extension(self, extension):
        try:
            super().build_extension(extension)
        except Exception as error:
            print(f"pangu_ms: no compiled CPU operators, plain MindSpore in their place: {error}", file=sys.stderr)


setup(
    name="pangu_ms",
    version=version,
    description="openPangu-2.0 on MindSpore",
    license="Apache-2.0",
    packages=find_packages(include=["pangu_ms", "pangu_ms.*"]),
    package_data={"pangu_ms.text": ["*.jinja"]},
    ext_modules=[Extension("pangu_ms.ops._cpu", sorted(glob("pangu_ms/ops/cpu/*.cpp")), extra_compile_args=FLAGS,
                           depends=sorted(glob("pangu_ms/ops/cpu/*.h")), extra_link_args=["-pthread"], optional=True)],
    cmdclass={"build_ext": BuildIfPossible},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "mindspore==2.9.0",
        "jinja2>=3.1",
        "mindformers==1.9.0",
        "ml_dtypes>=0.4",
        "numpy<2",
        "packaging>=23",
        "protobuf>=3.20",
        "pyyaml>=6",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tokenizers>=0.21",
        "tqdm>=4.65",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "safetensors>=0.4", "transformers>=4.52",
                 "pyarrow>=15"],
        "plot": ["matplotlib>=3.7"],
        "data": ["pyarrow>=15"],
    },
    entry_points={
        "console_scripts": [
            "pangu-generate = pangu_ms.generation.command:main",
            "pangu-convert = pangu_ms.conversion.command:main",
            "pangu-train = pangu_ms.training.run.command:main",
        ],
    },
)
