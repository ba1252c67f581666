"""Makes a virtual environment with the PyTorch that gridgrad is compared with.

    python install.py     # prints its interpreter

The folder is $GRIDGRAD_PYTORCH, or target/pytorch; one that has this version already is left as it is. The processor-only package
(some 200 MB) comes from PyTorch's own index; where that cannot be reached, PyPI's package brings the CUDA libraries along (5 GB
on the disk), which the comparison does not use.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

VERSION = "2.15.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def interpreter() -> Path:
    """The environment's Python; installs what is not there yet."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("GRIDGRAD_PYTORCH", root / "target" / "pytorch")).absolute()
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    # Packages of PyTorch's own index have +cpu behind the version.
    has_torch = f"import torch; assert torch.__version__.split('+')[0] == '{VERSION}'"
    if subprocess.run([python, "-c", has_torch], capture_output=True).returncode != 0:
        pip = [python, "-m", "pip", "install", f"torch=={VERSION}"]
        from_index = subprocess.run([*pip, "--retries", "0", "--index-url", CPU_INDEX], stdout=sys.stderr)
        if from_index.returncode != 0:
            print(f"{CPU_INDEX} has no answer; asking PyPI", file=sys.stderr)
            if subprocess.run(pip, stdout=sys.stderr).returncode != 0:
                sys.exit(f"PyTorch {VERSION} comes neither from {CPU_INDEX} nor from PyPI")
    return python


if __name__ == "__main__":
    print(interpreter())
