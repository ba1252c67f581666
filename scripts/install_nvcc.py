#!/usr/bin/env python3
"""Installs NVIDIA's compiler for this checkout, from PyPI wheels of pinned versions: no CUDA toolkit, no root.

    python3 scripts/install_nvcc.py                  # nvcc into .nvcc/toolkit, where build.rs finds it (271 MB)
    python3 scripts/install_nvcc.py --disassembler   # also cuobjdump and nvdisasm, for scripts/check_kernels.py
    python3 scripts/install_nvcc.py --clang-format   # also clang-format, the version that CI checks kernels with

What is there already stays as it is. Needs Python 3.8 or newer with pip; nvcc itself needs g++ to run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / ".nvcc"

# Folder of .nvcc: a program in it that must run, and the wheels. Versions match each other: update them together.
# The disassemblers are not on PyPI for release 13.0; later ones read its files.
GROUPS = {
    "toolkit": (
        "nvidia/cu13/bin/nvcc",
        [
            "nvidia-cuda-nvcc==13.0.88",
            "nvidia-nvvm==13.0.88",
            "nvidia-cuda-crt==13.0.88",
            "nvidia-cuda-runtime==13.0.96",
            "nvidia-cuda-cccl==13.0.85",
        ],
    ),
    "disassembler": (
        "nvidia/cu13/bin/cuobjdump",
        ["nvidia-cuda-cuobjdump==13.2.51", "nvidia-cuda-nvdisasm==13.2.51"],
    ),
    "clang-format": ("clang_format/data/bin/clang-format", ["clang-format==23.1.5"]),
}


def program_in(folder, program):
    path = folder / program
    windows = path.with_suffix(".exe")
    return windows if windows.exists() else path


def is_installed(group):
    program, wheels = GROUPS[group]
    folder = ROOT / group
    try:
        listed = (folder / "wheels.txt").read_text().split()
    except OSError:
        return False
    return listed == wheels and program_in(folder, program).exists()


def install(group):
    """Installs beside the old folder and then takes its place, so that an interrupted run leaves the old or nothing."""
    program, wheels = GROUPS[group]
    print("installing %s" % ", ".join(wheels), flush=True)
    ROOT.mkdir(exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix="part-", dir=str(ROOT)))
    try:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--no-compile", "--only-binary=:all:", "--target", str(part)] + wheels
        if subprocess.run(pip, env=dict(os.environ, PIP_USER="0", PIP_ROOT_USER_ACTION="ignore")).returncode != 0:
            sys.exit("error: pip could not install these wheels (its message is above); nothing was changed")
        path = program_in(part, program)
        if not path.exists():
            sys.exit("error: the wheels hold no %s" % program)
        check = subprocess.run([str(path), "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if check.returncode != 0:
            sys.exit("error: %s does not run here:\n%s" % (program, check.stdout.decode(errors="replace")))
        (part / "wheels.txt").write_text("\n".join(wheels) + "\n")
        part.chmod(0o755)
        shutil.rmtree(str(ROOT / group), ignore_errors=True)
        part.rename(ROOT / group)
    finally:
        shutil.rmtree(str(part), ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disassembler", action="store_true", help="also cuobjdump and nvdisasm")
    parser.add_argument("--clang-format", action="store_true", help="also clang-format")
    arguments = parser.parse_args()
    for group, wanted in (
        ("toolkit", True),
        ("disassembler", arguments.disassembler),
        ("clang-format", arguments.clang_format),
    ):
        if wanted:
            if not is_installed(group):
                install(group)
            print(program_in(ROOT / group, GROUPS[group][0]))


if __name__ == "__main__":
    main()
