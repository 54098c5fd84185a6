#!/usr/bin/env bash
# Proves and measures the kernels on a machine with a GPU, in one command, without network:
#
#   scripts/gpu.sh [--rehearse] [--tune OP] [--long] [--out DIR] [--wheels DIR]
#
# Builds the native parts, runs the tests of every op on every backend, compute-sanitizer, and the benchmarks: the short
# set (under 8 minutes), with --long the others too, going on where an earlier run stopped; then the errors against
# float64. Records go to bench/results/,
# what was printed to DIR (default gpu-run). Python packages that are missing are taken from the folder of wheels.
# --tune chooses the configurations of one op after the tests, for at most 15 minutes; what it changed in kernels/ goes to
# DIR too. --rehearse does every step on a machine without a GPU, on the CPU and on little; its records go to DIR.
# Exits with 1 if a build, a test or a correctness check failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=gpu-run wheels= rehearse= long= tune=
while [ $# -gt 0 ]; do
    case $1 in
        --rehearse) rehearse=1 ;;
        --long) long=1 ;;
        --tune) tune=${2:?--tune needs an op}; shift ;;
        --out) out=${2:?--out needs a folder}; shift ;;
        --wheels) wheels=${2:?--wheels needs a folder}; shift ;;
        *) echo "scripts/gpu.sh: $1 is not an option; allowed: --rehearse, --tune OP, --long, --out DIR, --wheels DIR." >&2; exit 2 ;;
    esac
    shift
done
mkdir -p "$out"
failed=0

# step NAME SECONDS COMMAND...: runs it, keeps what it prints, and goes on whatever happens
step() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1
    local code=$?
    printf '%-12s exit %-3s %4s s   %s\n' "$name" "$code" "$((SECONDS - start))" "$(tail -n 1 "$out/$name.txt")"
    return $code
}

environment() {
    "$python" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__)'
    "$python" -c 'import triton; print("triton", triton.__version__)'
    command -v nvcc && nvcc --version | tail -n 2
    [ -n "$rehearse" ] && return 0
    nvidia-smi
    "$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "PyTorch sees no GPU (--rehearse needs none)")'
}

packages() {
    local missing=()
    for name in pybind11 ninja pytest hypothesis; do "$python" -c "import $name" 2>/dev/null || missing+=("$name"); done
    [ ${#missing[@]} -eq 0 ] && { echo "nothing is missing"; return 0; }
    [ -n "$wheels" ] || { echo "missing: ${missing[*]}; --wheels names a folder that holds them"; return 1; }
    "$python" -m pip install --no-index --find-links "$wheels" "${missing[@]}"
}

sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "skipped: compute-sanitizer is not installed"; return 0; }
    [ -z "$rehearse" ] || { echo "skipped: there is no GPU in a rehearsal"; return 0; }
    local tests=(-m pytest tests/ops/test_rms_norm.py -q -x -p no:cacheprovider -k "cuda and shapes")
    for tool in memcheck racecheck initcheck synccheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" "${tests[@]}"
        local code=$?
        if grep -q "Device not supported" "$out/sanitizer.txt"; then
            echo "skipped: compute-sanitizer does not support this device"
            return 0
        fi
        [ $code -eq 0 ] || { echo "$tool: exit $code"; return $code; }
    done
}
export -f environment packages sanitizer
export python out wheels rehearse

step environment 120 bash -c environment || { cat "$out/environment.txt"; exit 1; }
step packages 300 bash -c packages || { cat "$out/packages.txt"; exit 1; }
step build 600 "$python" setup.py build_native --inplace || failed=1
if [ -n "$rehearse" ]; then
    step tests 300 "$python" -m pytest tests/ops/test_rms_norm.py -q -p no:cacheprovider || failed=1
    [ -z "$tune" ] || step tune 600 "$python" -m bench tune "$tune" --rehearse --top 1 --seconds 240 --results "$out" || failed=1
    step sanitizer 60 bash -c sanitizer || failed=1
    step bench 300 "$python" -m bench ops swiglu --short --results "$out" || failed=1
    step errors 300 "$python" -m bench errors swiglu --results "$out" || failed=1
else
    step tests 600 "$python" -m pytest tests/ops -q -p no:cacheprovider || failed=1
    if [ -n "$tune" ]; then
        step tune 1080 "$python" -m bench tune "$tune" --seconds 900 || failed=1
        cp -r kernels "$out/"
    fi
    step sanitizer 180 bash -c sanitizer || failed=1
    step bench 480 "$python" -m bench ops --device cuda --short || failed=1
    [ -z "$long" ] || step bench-long 3600 "$python" -m bench ops --device cuda --resume || failed=1
    step errors 240 "$python" -m bench errors --device cuda || failed=1
    cp -r bench/results "$out/"
fi
exit $failed
