#!/usr/bin/env bash
# nvcc, but candle's products of quantized matrices (candle-kernels, mmq_instance_*.cu), which take most of a build's time
# and which training never calls, become functions that trap. For CI; a binary that is given away is built without it.
#
#     NVCC=$PWD/tools/nvcc_without_quantized.sh CUDA_HOME=… cargo build --release --features cuda
set -euo pipefail

nvcc="${CUDA_HOME:?the folder that holds bin/nvcc}/bin/nvcc"
source="${!#}"
name="$(basename -- "$source" .cu)"
if [[ "$name" != mmq_instance_* || " $* " != *" -c "* ]]; then
    exec "$nvcc" "$@"
fi
object=""
while [[ $# -gt 1 ]]; do
    [[ "$1" != -o ]] || object="$2"
    shift
done
function="launch_mmq_gguf_${name#mmq_instance_}"
grep -q "extern \"C\" void $function(" "$source" || { echo "$source has no function $function: $0 is out of date" >&2; exit 1; }
echo "void $function(void) { __builtin_trap(); }" | "${CC:-cc}" -x c -O1 -fPIC -c - -o "$object"
