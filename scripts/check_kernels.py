#!/usr/bin/env python3
"""Reads what the compiler made of every kernel, prints it as a table, and fails on what must not be.

    python3 scripts/check_kernels.py                  # builds what `cargo test --features emulator` needs, and checks it
    python3 scripts/check_kernels.py --out-dir DIR    # checks this OUT_DIR of build.rs
    python3 scripts/check_kernels.py --test           # tests the parsers of this file

It fails where, for any target,
- a kernel spills registers or has a stack frame;
- a tensor-core kernel has no tensor-core instruction (HMMA, HGMMA, IMMA, ...) in its machine code. A .cu file lists the
  beginnings of the names of its tensor-core kernels in a comment line, and each must begin the name of some kernel:

      // tensor cores: matmul_bf16, matmul_f16

The table has a line for each kernel: threads of a block by its __launch_bounds__; static shared memory, stack frame and
spills in bytes, the most of all targets; and for each target the registers of a thread, how many blocks a multiprocessor
holds, and the share of its threads that they are. Kernels that are launched with dynamic shared memory may fit less often.
All but the last two is what ptxas reported during the build.
Needs the disassembler: `scripts/install_nvcc.py --disassembler`, or cuobjdump on PATH.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import unittest
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARGO = ["cargo", "test", "--no-run", "--locked", "--features", "emulator"]
CARGO += ["--message-format", "json-render-diagnostics"]

# CUDA C++ Programming Guide, table of technical specifications per compute capability: threads, blocks and shared memory
# in bytes of a multiprocessor. All have 65,536 registers, in four parts.
Multiprocessor = namedtuple("Multiprocessor", "threads blocks shared")
MULTIPROCESSORS = {
    80: Multiprocessor(2048, 32, 164 << 10),
    86: Multiprocessor(1536, 16, 100 << 10),
    87: Multiprocessor(1536, 16, 164 << 10),
    89: Multiprocessor(1536, 24, 100 << 10),
    90: Multiprocessor(2048, 32, 228 << 10),
    100: Multiprocessor(2048, 32, 228 << 10),
    120: Multiprocessor(1536, 24, 100 << 10),
}
RESERVED_SHARED = 1 << 10  # per block, from compute capability 8.0 on

Kernel = namedtuple("Kernel", "name target registers shared stack spills")
TENSOR_CORES = re.compile(r"\b(?:[BDHIOQU][A-Z]*MMA|UTC[A-Z]*MMA)\b")


def parse_report(report):
    """The kernels of a ptxas report (-v). Stack and spills include those of functions that a kernel calls."""
    kernels = []
    for block in re.split(r"Compiling entry function ", report)[1:]:
        name, target = re.match(r"'(\S+)' for '(sm_\w+)'", block).groups()
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers([^\n]*)", block)
        if not frames or not used:
            raise ValueError("the report on %s for %s has no stack frame or no registers" % (name, target))
        shared = re.search(r"(\d+) bytes smem", used.group(2))
        stack = sum(int(frame) for frame, _, _ in frames)
        spills = sum(int(stores) + int(loads) for _, stores, loads in frames)
        kernels.append(Kernel(name, target, int(used.group(1)), int(shared.group(1)) if shared else 0, stack, spills))
    return kernels


def parse_block_sizes(dump):
    """(kernel, target): threads of a block by __launch_bounds__, from `cuobjdump -elf`."""
    sizes, target, kernel, wanted = {}, None, None, False
    for line in dump.splitlines():
        if line.startswith("arch = "):
            target, kernel = line[len("arch = ") :].strip(), None
        elif line.startswith(".nv.info."):
            kernel = line[len(".nv.info.") :].strip()
        elif line.startswith("."):
            kernel = None
        elif "Attribute:" in line:
            wanted = "EIATTR_MAX_THREADS" in line
        elif "Value:" in line and wanted and kernel:
            x, y, z = (int(number, 16) for number in line.split("Value:")[1].split())
            sizes[kernel, target], wanted = x * y * z, False
    return sizes


def parse_tensor_cores(disassembly):
    """(kernel, target) with a tensor-core instruction, from `cuobjdump -sass`."""
    found, target, kernel = set(), None, None
    for line in disassembly.splitlines():
        if line.startswith("arch = "):
            target = line[len("arch = ") :].strip()
        elif "Function : " in line:
            kernel = line.split("Function : ")[1].strip()
        elif TENSOR_CORES.search(line):
            found.add((kernel, target))
    return found


def parse_marks(source):
    """The name prefixes of `// tensor cores:` lines."""
    lines = re.findall(r"^\s*//\s*tensor cores:(.*)$", source, re.MULTILINE)
    return [name for line in lines for name in re.split(r"[\s,]+", line.strip().rstrip(".")) if name]


def architecture(target):
    """90 of sm_90a."""
    return int(re.sub(r"\D", "", target))


def occupancy(target, registers, shared, threads):
    """Blocks that a multiprocessor holds at once, and their share of its threads; None for targets not in the table."""
    limits = MULTIPROCESSORS.get(architecture(target))
    if limits is None or not threads:
        return None
    warps = -(-threads // 32)
    # Registers are given to warps by 256, from one of four parts with 16,384 each.
    warps_by_registers = 16384 // max(256, -(-registers * 32 // 256) * 256) * 4
    by_shared = limits.shared // (-(-(shared + RESERVED_SHARED) // 128) * 128)
    blocks = min(limits.blocks, limits.threads // (warps * 32), warps_by_registers // warps, by_shared)
    return blocks, blocks * warps * 32 / limits.threads


def find_cuobjdump():
    local = ROOT / ".nvcc/disassembler/nvidia/cu13/bin/cuobjdump"
    found = str(local) if local.exists() else shutil.which("cuobjdump")
    return found or sys.exit("error: no cuobjdump; run `python3 scripts/install_nvcc.py --disassembler`")


def run(cuobjdump, flag, fatbin):
    tools = os.path.dirname(cuobjdump)
    environment = dict(os.environ, PATH=tools + os.pathsep + os.environ.get("PATH", ""))
    done = subprocess.run([cuobjdump, flag, str(fatbin)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit("error: cuobjdump %s %s: %s" % (flag, fatbin.name, done.stderr.decode(errors="replace").strip()))
    return done.stdout.decode(errors="replace")


def out_dir_of_build():
    """Where cargo's newest build of the crate has put the kernels."""
    done = subprocess.run(CARGO, cwd=str(ROOT), stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit("error: the build failed")
    for line in done.stdout.decode().splitlines():
        message = json.loads(line) if line.startswith("{") else {}
        if message.get("reason") == "build-script-executed" and re.search(r"\bgridgrad\b", message["package_id"]):
            return Path(message["out_dir"])
    sys.exit("error: cargo named no build script of gridgrad")


def check(source, out_dir, cuobjdump):
    """Rows of the table and problems of one kernel file."""
    fatbin, report = (out_dir / (source.stem + extension) for extension in (".fatbin", ".ptxas"))
    if not fatbin.exists() or not report.exists():
        return [], ["%s was not compiled: no nvcc?" % source.name]
    kernels = parse_report(report.read_text())
    sizes = parse_block_sizes(run(cuobjdump, "-elf", fatbin))
    marks = tuple(parse_marks(source.read_text()))
    tensor_cores = parse_tensor_cores(run(cuobjdump, "-sass", fatbin)) if marks else set()
    rows, problems = [], []
    for kernel in sorted(kernels):
        where = "%s: %s for %s" % (source.name, kernel.name, kernel.target)
        if kernel.spills or kernel.stack:
            text = "%s has a stack frame of %d bytes and spills %d bytes"
            problems.append(text % (where, kernel.stack, kernel.spills))
        if marks and kernel.name.startswith(marks) and (kernel.name, kernel.target) not in tensor_cores:
            problems.append("%s uses no tensor cores" % where)
        rows.append((kernel, sizes.get((kernel.name, kernel.target))))
    for mark in marks:
        if not any(kernel.name.startswith(mark) for kernel in kernels):
            problems.append("%s: no kernel's name begins with the listed %s" % (source.name, mark))
    if not kernels:
        problems.append("%s: ptxas reported no kernel" % source.name)
    return rows, problems


def print_table(rows):
    """A line for each kernel, and in it for each target: registers, blocks of a multiprocessor, occupancy."""
    lines = {}
    for kernel, threads in rows:
        lines.setdefault(kernel.name, {})[kernel.target] = (kernel, threads)
    targets = sorted({kernel.target for kernel, _ in rows}, key=architecture)
    table = [("kernel", "threads", "shared", "stack", "spills") + tuple(targets)]
    for name, cells in lines.items():
        kernels, threads = [kernel for kernel, _ in cells.values()], max(threads or 0 for _, threads in cells.values())
        bytes_of = (max(column) for column in zip(*((kernel.shared, kernel.stack, kernel.spills) for kernel in kernels)))
        row = (name, str(threads or "-")) + tuple(str(count) for count in bytes_of)
        table.append(row + tuple(cell(*cells[target]) if target in cells else "-" for target in targets))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        cells = [text.rjust(width) for text, width in zip(row[1:], widths[1:])]
        print("  ".join([row[0].ljust(widths[0])] + cells))


def cell(kernel, threads):
    fit = occupancy(kernel.target, kernel.registers, kernel.shared, threads)
    return "%d %s" % (kernel.registers, "%2d %3.0f%%" % (fit[0], 100 * fit[1]) if fit else " -    -")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, help="OUT_DIR of build.rs; without it, cargo builds and says")
    parser.add_argument("--test", action="store_true", help="test the parsers of this file")
    arguments = parser.parse_args()
    if arguments.test:
        unittest.main(argv=[sys.argv[0]])
    sources = sorted((ROOT / "kernels").glob("*.cu"))
    out_dir = arguments.out_dir or out_dir_of_build()
    cuobjdump = find_cuobjdump()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = list(pool.map(lambda source: check(source, out_dir, cuobjdump), sources))
    print_table([row for rows, _ in checked for row in rows])
    problems = [problem for _, problems in checked for problem in problems]
    for problem in problems:
        print("error: " + problem, file=sys.stderr)
    names = {kernel.name for rows, _ in checked for kernel, _ in rows}
    print("%d files, %d kernels, %d problems" % (len(sources), len(names), len(problems)))
    sys.exit(1 if problems else 0)


REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'spill_f32' for 'sm_80'
ptxas info    : Function properties for spill_f32
    336 bytes stack frame, 664 bytes spill stores, 688 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 336 bytes cumulative stack size, 372 bytes cmem[0]
ptxas info    : Compile time = 25.504 ms
ptxas info    : Compiling entry function 'reverse_f32' for 'sm_90a'
ptxas info    : Function properties for reverse_f32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 1024 bytes smem
"""

ELF = """arch = sm_90a
.nv.info.scale_bf16
\t<0x1>
\tAttribute:\tEIATTR_CUDA_API_VERSION
\tFormat:\tEIFMT_SVAL
\tValue:\t0x82
\t<0x2>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x20 0x8 0x1
.nv.callgraph
"""

SASS = """arch = sm_80
\tcode for sm_80
\t\tFunction : mma_bf16
        /*0130*/                   HMMA.16816.F32.BF16 R16, R8.reuse, R12, RZ ;     /* 0x0000000c0810723c */
\t\tFunction : plain_f32
        /*0130*/                   FFMA R16, R8, R12, RZ ;     /* 0x0000000c0810723c */
"""


class Parsers(unittest.TestCase):
    def test_report(self):
        spill, reverse = parse_report(REPORT)
        self.assertEqual(spill, Kernel("spill_f32", "sm_80", 32, 0, 336, 664 + 688))
        self.assertEqual(reverse, Kernel("reverse_f32", "sm_90a", 14, 1024, 0, 0))
        with self.assertRaises(ValueError):
            parse_report("ptxas info : Compiling entry function 'cut' for 'sm_80'\n")

    def test_block_sizes(self):
        self.assertEqual(parse_block_sizes(ELF), {("scale_bf16", "sm_90a"): 256})

    def test_tensor_cores(self):
        self.assertEqual(parse_tensor_cores(SASS), {("mma_bf16", "sm_80")})
        for name in ("HGMMA.64x64x16.F32.BF16", "IMMA.16832.S8.S8", "QMMA.16832.F32", "UTCHMMA gdesc", "DMMA.8x8x4"):
            self.assertTrue(TENSOR_CORES.search(name), name)
        self.assertFalse(TENSOR_CORES.search("FFMA R1 ; LDSM.16.M88 ; IMAD"))

    def test_marks(self):
        self.assertEqual(parse_marks("// x\n// tensor cores: a_bf16, a_f16\n// tensor cores: b.\n"), ["a_bf16", "a_f16", "b"])

    def test_occupancy(self):
        # By threads, by registers (64 for each of 2048 threads is half), by shared memory, by blocks.
        self.assertEqual(occupancy("sm_80", 32, 0, 256), (8, 1.0))
        self.assertEqual(occupancy("sm_80", 64, 0, 256), (4, 0.5))
        self.assertEqual(occupancy("sm_89", 32, 48 << 10, 256), (2, 512 / 1536))
        self.assertEqual(occupancy("sm_86", 32, 0, 32), (16, 512 / 1536))
        self.assertIsNone(occupancy("sm_80", 32, 0, None))


if __name__ == "__main__":
    main()
