#!/usr/bin/env bash
# CUTLASS's headers where candle-flash-attn's build script looks for them, from a pinned Python wheel instead of a git host.
# CUTLASS 3.5.0's wheel holds the very files of the commit that candle-flash-attn 0.11.1 asks for. Needs git and python3 with pip.
#
#     tools/cutlass.sh DIR
#     export CUDAFORGE_HOME=DIR
set -euo pipefail

dir="${1:?usage: tools/cutlass.sh DIR}"
wheel=nvidia-cutlass==3.5.0.0
commit=7d49e6c7e2f8896c47f586706e67e1fb215529dc
checkout="$dir/git/checkouts/cutlass-${commit:0:16}"
if [[ "$(git -C "$checkout" rev-parse HEAD 2>/dev/null || true)" == "$commit" ]]; then
    exit 0
fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile \
    --no-cache-dir --only-binary=:all: --target "$scratch" "$wheel"
rm -rf "$checkout"
mkdir -p "$checkout/tools/util"
mv "$scratch/cutlass_library/source/include" "$checkout/include"
mv "$scratch/cutlass_library/source/tools/util/include" "$checkout/tools/util/include"
# The build script asks git which commit this is, and nothing else of it.
git init --quiet "$checkout"
echo "$commit" > "$checkout/.git/HEAD"
