"""Makes a virtual environment with the PyTorch that gridgrad is compared with.

    python install.py     # prints its interpreter

The folder is $GRIDGRAD_PYTORCH, or target/pytorch. The processor-only package (some 200 MB) comes from PyTorch's own index;
where that cannot be reached, PyPI's package brings the CUDA libraries along (5 GB on the disk), which the comparison does not
use.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.15.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def interpreter() -> Path:
    """The environment's Python; installs what is not there yet."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("GRIDGRAD_PYTORCH", root / "target" / "pytorch")).absolute()
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0:
        pip = [python, "-m", "pip", "install", TORCH]
        from_index = subprocess.run([*pip, "--retries", "0", "--index-url", CPU_INDEX], stdout=sys.stderr)
        if from_index.returncode != 0:
            print(f"{CPU_INDEX} has no answer; asking PyPI", file=sys.stderr)
            subprocess.run(pip, stdout=sys.stderr, check=True)
    return python


if __name__ == "__main__":
    print(interpreter())
