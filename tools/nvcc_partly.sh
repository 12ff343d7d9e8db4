#!/usr/bin/env bash
# nvcc, but kernels that a build has no use for become functions that say so and stop the process. What is left out:
#
# - of candle-flash-attn (feature `flash-attn`): fp16, paged keys, and the widths of a head that are not among
#   ADFREEZE_FLASH_HEAD_DIMS (default "32 64 96 128": all that adfreeze hands to it; "" leaves all out); in the rest
#   dropout, ALiBi, soft caps, windows and padded widths. PTX is kept beside their machine code, for newer GPUs. After a
#   change of the widths: cargo clean --release -p candle-flash-attn.
# - with ADFREEZE_QUANTIZED=no: candle's products of quantized matrices, which take most of a build's time and which
#   training never calls. For CI; a binary that is given away has them.
#
#     NVCC=$PWD/tools/nvcc_partly.sh CUDA_HOME=… cargo build --release --features flash-attn
set -euo pipefail

nvcc="${CUDA_HOME:?the folder that holds bin/nvcc}/bin/nvcc"
arguments=("$@")
source="${!#}"
name="$(basename -- "$source" .cu)"
read -r -a widths <<< "${ADFREEZE_FLASH_HEAD_DIMS-32 64 96 128}"

# pattern: what the source must hold; prints the part that sed's \1 is.
part() {
    local found
    found="$(sed -n "s/^$1.*/\1/p" "$source" | head -1)"
    [[ -n "$found" ]] || { echo "$source is not what $0 expects: the script is out of date" >&2; exit 1; }
    echo "$found"
}

# declarations, function, message: compiles that function instead of the source.
instead() {
    local object="" i
    for ((i = 0; i + 1 < ${#arguments[@]}; i++)); do
        [[ "${arguments[i]}" != -o ]] || object="${arguments[i + 1]}"
    done
    printf '#include <cstdio>\n#include <cstdlib>\n%s\n%s { std::fputs("%s\\n", stderr); std::abort(); }\n' "$@" |
        "${CXX:-c++}" -x c++ -O1 -fPIC -c - -o "$object"
}

if [[ " $* " != *" -c "* ]]; then
    exec "$nvcc" "$@"
fi
case "$name" in
    mmq_instance_*)
        [[ "${ADFREEZE_QUANTIZED:-yes}" == no ]] || exec "$nvcc" "$@"
        function="$(part 'extern "C" void \(launch_mmq_gguf_[a-z0-9_]*\)(')"
        instead "" "extern \"C\" void $function()" "products of quantized matrices are not in this build"
        ;;
    flash_api)
        [[ ${#widths[@]} -eq 0 ]] || exec "$nvcc" "$@"
        function="$(part 'extern "C" void \(run_mha\)(')"
        instead "" "extern \"C\" void $function()" "candle-flash-attn is not in this build"
        ;;
    flash_fwd_*)
        function="$(part 'void \(run_mha_fwd_[a-z_]*<cutlass::[a-z0-9_]*, [0-9]*, [a-z]*>\)(Flash_fwd_params &params, cudaStream_t stream) {')"
        for width in "${widths[@]}"; do
            if [[ "$function" == "run_mha_fwd_<cutlass::bfloat16_t, $width, "* ]]; then
                without=()
                for part in DROPOUT ALIBI SOFTCAP LOCAL UNEVEN_K; do
                    without+=("-DFLASHATTENTION_DISABLE_$part")
                done
                exec "$nvcc" "${without[@]}" -gencode=arch=compute_80,code=compute_80 "$@"
            fi
        done
        declarations='struct Flash_fwd_params; typedef struct CUstream_st *cudaStream_t;
            namespace cutlass { struct half_t; struct bfloat16_t; }
            template <typename, int, bool> void run_mha_fwd_(Flash_fwd_params &, cudaStream_t);
            template <typename, int, bool> void run_mha_fwd_splitkv_paged_(Flash_fwd_params &, cudaStream_t);
            template <>'
        instead "$declarations" "void $function(Flash_fwd_params &, cudaStream_t)" \
            "$function of candle-flash-attn is not in this build: see ADFREEZE_FLASH_HEAD_DIMS in tools/nvcc_partly.sh"
        ;;
    *) exec "$nvcc" "$@" ;;
esac
