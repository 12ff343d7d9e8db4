#!/usr/bin/env bash
# Compiles every kernel for sm_80 and sm_90a and looks at what the assembler says: a register spill fails unless
# kernels/spills.txt lists the kernel with a reason ("KERNEL ARCHITECTURE reason", # begins a comment).
#
#     tools/check_kernels.sh [FILE.cu …]        nvcc must be in PATH: tools/cuda_compiler.sh
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
files=("$@")
[[ ${#files[@]} -gt 0 ]] || files=("$root"/kernels/*.cu)
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

compile() {
    local name
    name="$(basename "$1" .cu)"
    nvcc -std=c++17 -O3 --expt-relaxed-constexpr -Xptxas -v -fatbin \
        -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
        "$1" -o "$2/$name.fatbin" > "$2/$name.log" 2>&1 || { cat "$2/$name.log" >&2; exit 1; }
}
export -f compile
printf '%s\0' "${files[@]}" | xargs -0 -P 2 -I{} bash -c 'compile "$1" "$2"' _ {} "$scratch"

python3 - "$root/kernels/spills.txt" "$scratch"/*.log <<'PY'
import re
import sys

allowed = set()
for line in open(sys.argv[1]):
    words = line.split("#")[0].split()
    if words:
        allowed.add((words[0], words[1]))
kernels, spilled = 0, []
for log in sys.argv[2:]:
    kernel = arch = None
    for line in open(log):
        if m := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel, arch = m.groups()
            kernels += 1
        if (m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)) and m.groups() != ("0", "0"):
            spilled.append((kernel, arch, m.group(0)))
bad = [s for s in spilled if s[:2] not in allowed]
for kernel, arch, what in bad:
    print(f"{kernel} for {arch}: {what}", file=sys.stderr)
stale = allowed - {s[:2] for s in spilled}
for kernel, arch in sorted(stale):
    print(f"kernels/spills.txt lists {kernel} for {arch}, which does not spill", file=sys.stderr)
print(f"{kernels} kernels compiled (each architecture counted), {len(spilled)} spill, {len(bad)} of them unlisted")
sys.exit(bool(bad or stale or not kernels))
PY
