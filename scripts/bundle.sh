#!/usr/bin/env bash
# Packs what a machine with a GPU and without Rust needs to test and measure the crate: fixtures, executables with the
# kernels in them, compressed since each holds all kernels, and a run.sh that unpacks and runs them and writes a report.
# Any x86-64 Linux with an NVIDIA driver runs it, if its glibc is as new as the one printed at the end.
#
#     scripts/bundle.sh [FOLDER]                # FOLDER is gridgrad-bundle where absent, and must not exist
#     PROFILE=dev scripts/bundle.sh [FOLDER]    # debug builds, which are larger and slow: for trying this script
#     scripts/bundle.sh FOLDER --without-nvcc   # packs even a build that holds no GPU kernels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Targets of `cargo test`, beside the unit tests, and of `cargo bench`. Each executable holds all kernels, so no others.
tests=(device)
benches=(ops)
limit_megabytes="${LIMIT_MEGABYTES:-60}"

folder="${1:-gridgrad-bundle}"
profile="${PROFILE:-release}"
[[ "${2:-}" == --without-nvcc ]] || export GRIDGRAD_REQUIRE_NVCC=1
if [[ -e "$folder" ]]; then
    echo "error: $folder exists; name another folder" >&2
    exit 1
fi
part="$(mktemp -d "$folder.part-XXXXXX")"
trap 'rm -rf "$part"' EXIT
mkdir -p "$part/bin"

# executables KIND ARGUMENT…: runs cargo and prints a line `NAME PATH` for each executable of a target of this kind.
executables() {
    local kind="$1"
    shift
    cargo "$@" --locked --message-format json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line) if line.startswith("{") else {}
    if message.get("executable") and sys.argv[1] in message["target"]["kind"]:
        print(message["target"]["name"], message["executable"])
' "$kind"
}

# take NAME LIST AS: packs the executable that LIST has under NAME, without what debuggers need.
take() {
    local path
    path="$(awk -v name="$1" '$1 == name { print $2 }' <<<"$2")"
    if [[ -z "$path" ]]; then
        echo "error: cargo built no '$1'" >&2
        return 1
    fi
    strip -o "$part/bin/$3" "$path"
    glibc+=" $(objdump -T "$part/bin/$3" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1)"
    gzip -9 --no-name "$part/bin/$3"
}

glibc=
built="$(executables lib test --no-run --profile "$profile" --lib)"
take gridgrad "$built" test-gridgrad
built="$(executables test test --no-run --profile "$profile" "${tests[@]/#/--test=}")"
for name in "${tests[@]}"; do
    take "$name" "$built" "test-$name"
done
built="$(executables bench bench --no-run --profile "$profile" "${benches[@]/#/--bench=}")"
for name in "${benches[@]}"; do
    take "$name" "$built" "bench-$name"
done
built="$(executables bin build --profile "$profile" --bin gridgrad)"
take gridgrad "$built" gridgrad
mkdir -p "$part/tests"
cp -r tests/fixtures "$part/tests/fixtures"

glibc="$(tr ' ' '\n' <<<"$glibc" | sort -V | tail -1)"
version="$(git describe --always --dirty 2>/dev/null || echo unknown)"
cat >"$part/README.txt" <<END
gridgrad $version: tests and benchmarks for a machine with an NVIDIA GPU.
Needs x86-64 Linux, ${glibc/_/ } or newer, and an NVIDIA driver for CUDA 13.0 (branch 580) or newer. No Rust, no CUDA.

    ./run.sh             everything; the report goes to report-<machine>-<time>/
    ./run.sh tests       tests on the GPU
    ./run.sh sanitizer   tests under compute-sanitizer, where it is on PATH (part of the CUDA toolkit)
    ./run.sh benches     benchmarks
END
cat >"$part/run.sh" <<'END'
#!/usr/bin/env bash
# Runs the tests, the tests under compute-sanitizer, and the benchmarks on this machine's GPU. Exit code 1 if any fails.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

for packed in bin/*.gz; do
    [[ -e "$packed" ]] || continue # unpacked before
    gunzip "$packed" && chmod +x "${packed%.gz}" || exit 1
done

export GRIDGRAD_TEST_DEVICE=cuda
export CARGO_MANIFEST_DIR="$PWD" # where tests look for fixtures
parts="${*:-tests sanitizer benches}"
report="report-$(hostname)-$(date +%Y%m%d-%H%M%S)"
mkdir -p "$report"
failed=0

# step NAME COMMAND…: runs the command into a log of this name.
step() {
    local name="$1" start="$SECONDS" outcome=passed
    shift
    if ! "$@" >"$report/$name.log" 2>&1; then
        outcome=FAILED
        failed=1
    fi
    printf '%-7s %-28s %5d s   %s\n' "$outcome" "$name" "$((SECONDS - start))" \
        "$(grep -h '^test result\|ERROR SUMMARY\|RACECHECK SUMMARY' "$report/$name.log" | tail -1)" | tee -a "$report/summary.txt"
}

{
    head -1 README.txt
    date -u
    uname -srm
    grep -m1 'model name' /proc/cpuinfo
    nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv 2>&1
} | tee "$report/summary.txt"
step doctor bin/gridgrad doctor
if [[ " $parts " == *" tests "* ]]; then
    step unit bin/test-gridgrad
    # By themselves: those of `gpu` count the memory of the process.
    for module in gpu ops train; do
        step "$module" bin/test-device "$module::"
    done
fi
if [[ " $parts " == *" sanitizer "* ]]; then
    if command -v compute-sanitizer >/dev/null; then
        # One thread: a report then belongs to the test named before it.
        for tool in memcheck racecheck initcheck synccheck; do
            step "$tool-ops" compute-sanitizer --tool "$tool" --error-exitcode 9 bin/test-device ops:: --test-threads=1 --nocapture
        done
    else
        echo 'skipped compute-sanitizer: it is not on PATH' | tee -a "$report/summary.txt"
    fi
fi
if [[ " $parts " == *" benches "* ]]; then
    for bench in bin/bench-*; do
        step "${bench#bin/}" "$bench" --bench
    done
fi
echo "The report is in $report"
exit "$failed"
END
chmod +x "$part/run.sh"
chmod 755 "$part"

bytes="$(du -sb "$part" | cut -f1)"
if ((bytes > limit_megabytes * 1000 * 1000)); then
    du -ab "$part" | sort -rn | head -12 >&2
    echo "error: the bundle has $((bytes / 1000 / 1000)) MB, more than $limit_megabytes" >&2
    exit 1
fi
mv "$part" "$folder"
printf '%s: %d.%d MB, needs %s\n' "$folder" "$((bytes / 1000000))" "$((bytes % 1000000 / 100000))" "${glibc/_/ }"
