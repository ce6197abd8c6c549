"""The build: top-level folders mapped into one package, so that no generic import name is taken."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {
    "synco_fast": "synco_fast",
    "synco_fast.kernels": "kernels",
    "synco_fast.data": "data",
    "synco_fast.bench": "bench",
}
#: Below ``bench``: scripts that made records.
STUDIES = ("experiments", "experiments.*")
#: What single commands need beside the rest.
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
DETECTION = ["torchmetrics>=1.4", "pycocotools>=2.0.8"]
EMBED = ["pyarrow>=15"]
REPORT = ["scikit-learn>=1.4"]
DALI = ["nvidia-dali-cuda130>=2.4,<3; platform_system == 'Linux'"]
JPEG = ["simplejpeg>=1.8"]
GENERATOR = ["torchmetrics>=1.4"]
COMPLETION = ["argcomplete>=3"]
#: An example that a test runs.
LIGHTNING = ["lightning>=2.4"]
#: The website; ruff formats the signatures in its reference.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27", "ruff>=0.6"]
#: Trackers of metrics, and further places to read images from.
WANDB = ["wandb>=0.16"]
MLFLOW = ["mlflow-skinny>=2.10"]
HF = ["datasets>=4"]
STREAM = ["fsspec[http]>=2024.2"]


def packages() -> list[str]:
    """Every package below the mapped folders, by its import name, but for the studies, which are no part of it."""
    found = []
    for name, folder in FOLDERS.items():
        found += [name] + [f"{name}.{inner}" for inner in find_packages(str(ROOT / folder), exclude=STUDIES)]
    return found


def version() -> str:
    """The version from the package's own file, read without importing torch."""
    scope: dict[str, str] = {}
    exec((ROOT / "synco_fast" / "version.py").read_text(encoding="utf-8"), scope)
    return scope["__version__"]


def long_description() -> str:
    """The README without its pictures and links into the checkout, which lead nowhere on a package index.

    The text of the links stays.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?!https?://).*\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?://)[^)]+\)", r"\1", text)


setup(
    name="synco-fast",
    version=version(),
    description="Fast contrastive pretraining of image encoders with synthetic hard negatives: SynCo, MoCHi, MoCo v2",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    author="The synco-fast developers",
    keywords=[
        "self-supervised learning",
        "contrastive learning",
        "hard negatives",
        "pretraining",
        "SynCo",
        "MoCHi",
        "MoCo",
        "Triton",
        "PyTorch",
    ],
    project_urls={
        "SynCo": "https://arxiv.org/abs/2410.02401",
        "MoCHi": "https://arxiv.org/abs/2010.01028",
        "MoCo v2": "https://arxiv.org/abs/2003.04297",
        "Hard sample generation": "https://arxiv.org/abs/2202.06464",
    },
    python_requires=">=3.11",
    packages=packages(),
    package_dir=FOLDERS,
    package_data={"synco_fast": ["py.typed"], "synco_fast.report": ["*.html"]},
    install_requires=[
        "torch>=2.11,<2.15",
        "torchvision>=0.26,<0.30",
        "timm>=1.0.9",
        "numpy>=1.26",
        "pillow>=10.1",
        "pydantic>=2.7,<3",
        "pyyaml>=6.0",
        "rich>=13.8",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "safetensors>=0.4.5",
    ],
    extras_require={
        "export": EXPORT,
        "detection": DETECTION,
        "embed": EMBED,
        "report": REPORT,
        "dali": DALI,
        "jpeg": JPEG,
        "generator": GENERATOR,
        "completion": COMPLETION,
        "docs": DOCS,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "hf": HF,
        "stream": STREAM,
        "dev": [
            "mypy>=1.11",
            "pip>=22.3",  # tests build and install a wheel; environments that uv makes have none
            "pytest>=8.0",
            "pytest-benchmark>=4.0",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "setuptools>=77",
            "types-PyYAML",
            *EXPORT,
            *DETECTION,
            *EMBED,
            *REPORT,
            *DALI,
            *JPEG,
            *GENERATOR,
            *COMPLETION,
            *LIGHTNING,
        ],
    },
    entry_points={"console_scripts": ["synco-fast = synco_fast.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
