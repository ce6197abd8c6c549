"""The build: top-level folders mapped into one package, so that no generic import name is taken."""

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
GENERATOR = ["torchmetrics>=1.4"]


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


setup(
    name="synco-fast",
    version=version(),
    description="Fast contrastive pretraining of image encoders with synthetic hard negatives: SynCo, MoCHi, MoCo v2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
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
        "rich>=13.7",
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
        "generator": GENERATOR,
        "dev": [
            "mypy>=1.11",
            "pytest>=8.0",
            "pytest-benchmark>=4.0",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "types-PyYAML",
            *EXPORT,
            *DETECTION,
            *EMBED,
            *REPORT,
            *DALI,
            *GENERATOR,
        ],
    },
    entry_points={"console_scripts": ["synco-fast = synco_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
