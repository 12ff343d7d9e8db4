#!/usr/bin/env bash
# What a machine with a GPU needs beside its driver: cuBLAS and cuRAND of CUDA, and compute-sanitizer.
#
#     tools/gpu_libraries.sh find [12]     looks for them on this machine: the loader, CUDA toolkits, Python packages, and the
#                                          folder of an earlier fetch if ADFREEZE_CUDA_LIBS names it. No network is used. For a
#                                          binary that was built with another major version of CUDA (`adfreeze --version`): that
#     tools/gpu_libraries.sh fetch DIR     puts those of CUDA 13 into DIR, from pinned Python wheels
#     tools/gpu_libraries.sh peers DIR     a Python environment in DIR for benches/peers (several GB); its Python: DIR/bin/python
#
# find and fetch print lines to be read by a shell:
#     export ADFREEZE_CUDA_LIBS=FOLDER:FOLDER
#     SANITIZER=FILE
# and say on stderr what lies where. Exit code 1: a library is missing (a missing compute-sanitizer is only said). PYTHON names
# the Python, else it is python3; it needs pip to fetch.
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-python3}"
# Of the toolkit in tools/cuda_compiler.sh.
wheels=(
    nvidia-cublas==13.1.0.3
    nvidia-curand==10.4.0.35
    nvidia-cuda-sanitizer-api==13.0.85
)
# cublas opens cublasLt, which must lie beside it.
libraries=(libcuda.so.1 libcublas.so.MAJOR libcublasLt.so.MAJOR libcurand.so.10)

# Folders that may hold libraries of CUDA, one a line, the likeliest first.
folders() {
    local home
    tr : '\n' <<< "${ADFREEZE_CUDA_LIBS:-}"
    tr : '\n' <<< "${LD_LIBRARY_PATH:-}"
    { ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null || true; } |
        sed -n 's/.*(libc6,x86-64.*) => \(.*\)\/lib\(cuda\|cublas\|cublasLt\|curand\)\.so.*/\1/p'
    for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda /usr/local/cuda-1[23]*; do
        [[ -z "$home" ]] || printf '%s\n' "$home"/{lib64,lib,targets/x86_64-linux/lib}
    done
    # Wheels keep them in nvidia/*/lib; an old torch keeps its own beside itself.
    "$python" - <<'PY' 2>/dev/null || true
import glob, site, sys
for place in dict.fromkeys(sys.path + site.getsitepackages() + [site.getusersitepackages()]):
    for found in sorted(glob.glob(f"{place}/nvidia/*/lib")) + glob.glob(f"{place}/torch/lib"):
        print(found)
PY
    # Where drivers put theirs, beside what the loader knows.
    printf '%s\n' /usr/local/nvidia/lib64 /usr/lib64/nvidia /usr/lib/x86_64-linux-gnu /usr/lib64 /usr/lib/wsl/lib
}

# compute-sanitizer: in PATH, beside the libraries of a wheel, or in a toolkit.
sanitizer() {
    local folder file
    command -v compute-sanitizer && return
    while read -r folder; do
        for file in "$folder"/../{bin,compute-sanitizer}/compute-sanitizer "$folder"/../../compute-sanitizer/compute-sanitizer; do
            if [[ -x "$file" ]]; then
                realpath "$file"
                return
            fi
        done
    done
    return 1
}

# find_all MAJOR
find_all() {
    local all library folder missing=0 chosen=() found tool
    all="$(folders | awk 'NF && !seen[$0]++')"
    for library in "${libraries[@]/MAJOR/$1}"; do
        found=""
        while read -r folder; do
            if [[ -e "$folder/$library" ]]; then
                found="$folder"
                break
            fi
        done <<< "$all"
        if [[ -z "$found" ]]; then
            echo "$library: not found" >&2
            missing=1
            continue
        fi
        echo "$library: $found" >&2
        [[ " ${chosen[*]-} " == *" $found "* ]] || chosen+=("$found")
    done
    [[ ${#chosen[@]} -eq 0 ]] || printf 'export ADFREEZE_CUDA_LIBS=%q\n' "$(IFS=:; echo "${chosen[*]}")"
    if tool="$(sanitizer <<< "$all")"; then
        echo "compute-sanitizer: $tool" >&2
        printf 'SANITIZER=%q\n' "$tool"
    else
        echo "compute-sanitizer: not found" >&2
    fi
    return "$missing"
}

fetch() {
    local dir="$1" stamp="$1/.wheels"
    if [[ "$(cat "$stamp" 2>/dev/null || true)" != "${wheels[*]}" ]]; then
        scratch="$(mktemp -d)"
        trap 'rm -rf "$scratch"' EXIT
        "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile \
            --no-cache-dir --only-binary=:all: --target "$scratch" "${wheels[@]}"
        rm -rf "$dir"
        mkdir -p "$dir"
        mv "$scratch"/nvidia/cu13/{lib,bin} "$dir"/
        chmod +x "$dir"/bin/compute-sanitizer
        echo "${wheels[*]}" > "$stamp"
    fi
    ADFREEZE_CUDA_LIBS="$(cd "$dir" && pwd)/lib" find_all 13
}

peers() {
    local dir="$1" needs="$root/benches/peers/requirements.txt"
    if ! cmp -s "$needs" "$dir/.requirements"; then
        rm -rf "$dir"
        "$python" -m venv "$dir"
        "$dir/bin/python" -m pip install --quiet --disable-pip-version-check -r "$needs"
        cp "$needs" "$dir/.requirements"
    fi
    "$dir/bin/python" -c 'import torch, transformers, peft
print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}; GPU: {torch.cuda.is_available()}")'
}

usage="usage: tools/gpu_libraries.sh find [MAJOR] | fetch DIR | peers DIR"
case "${1:-}" in
    find) find_all "${2:-13}" ;;
    fetch) fetch "${2:?$usage}" ;;
    peers) peers "${2:?$usage}" ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
