#!/usr/bin/env bash
# A CUDA 13.0 compiler in DIR, from pinned Python wheels: no GPU, no driver, no root. Needs python3 with pip.
#
#     tools/cuda_compiler.sh DIR
#     export CUDA_HOME=DIR PATH=DIR/bin:$PATH
set -euo pipefail

dir="${1:?usage: tools/cuda_compiler.sh DIR}"
wheels=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
)
# What the folder must hold: the wheels, and the archives made below.
contents="${wheels[*]} archives"
stamp="$dir/.wheels"
if [[ "$(cat "$stamp" 2>/dev/null || true)" == "$contents" ]]; then
    exit 0
fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile \
    --no-cache-dir --only-binary=:all: --target "$scratch" "${wheels[@]}"
rm -rf "$dir"
mkdir -p "$dir"
cp -a "$scratch"/nvidia/cu13/. "$dir"/
chmod +x "$dir"/bin/* "$dir"/nvvm/bin/*
ln -sfn lib "$dir/lib64"
# The linker asks for these by name; what they hold is opened at run time, or is in cudart's static form.
for name in cuda cublas cublasLt curand nvrtc; do
    ar rcs "$dir/lib/lib$name.a"
done
ln -sf libcudart_static.a "$dir/lib/libcudart.a"
"$dir/bin/nvcc" --version | tail -2
echo "$contents" > "$stamp"
