#!/usr/bin/env bash
# What must be run on a machine with a GPU, and cannot be where there is none. Needs the binary (built elsewhere with
# `--features cuda`), the NVIDIA driver, cuBLAS and cuRAND (tools/gpu_libraries.sh), python3 with its standard library; no
# cargo, no network. `peers` needs PyTorch, transformers and PEFT too.
#
#     tools/gpu.sh correct     every op against f64, a stopped run that goes on, compute-sanitizer, the quickstart
#     tools/gpu.sh speed       every kernel beside its floor; steps at LLaVA-1.5-7B's shape with random weights
#     tools/gpu.sh peers       the same steps beside PyTorch + PEFT, alternately
#
#     --adfreeze FILE     the binary; else target/release/adfreeze
#     --python FILE       the Python of `peers`; else python3
#     --commit ID         of this checkout, where git does not tell; else the file COMMIT
#     --device cuda:N     else cuda:0
#     --only A,B          these items alone; what they find is appended to the file of an earlier call
#     --rehearse          the same on the CPU with tiny shapes, so that this script can be tried where there is no GPU. What needs
#                         one is left out, and nothing is claimed: results go to target/gpu-rehearsal
#
# A call ends within nine minutes: an item gets its own limit or what is left, and one that no longer fits is reported as left
# out. Each item's outcome is appended to benches/results/DATE-DEVICE-COMMIT/MODE.md, and figures to MODE.jsonl beside it,
# once the item ends; with OUT set, both are copied there too. Exit code 0: every item ran and passed.
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
total=525
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }

mode="${1:-}"
[[ "$mode" =~ ^(correct|speed|peers)$ ]] || usage
shift
binary="${CARGO_TARGET_DIR:-$root/target}/release/adfreeze" python=python3 commit="" device=cuda:0 only="" rehearse=""
while [[ $# -gt 0 ]]; do
    case "$1" in
        --rehearse) rehearse=1; device=cpu; shift; continue ;;
        --adfreeze | --python | --commit | --device | --only) [[ $# -gt 1 ]] || usage ;;
        *) usage ;;
    esac
    case "$1" in
        --adfreeze) binary="$2" ;;
        --python) python="$2" ;;
        --commit) commit="$2" ;;
        --device) device="$2" ;;
        --only) only="$2" ;;
    esac
    shift 2
done
[[ -x "$binary" ]] || { echo "$binary: no such program; --adfreeze names it" >&2; exit 2; }
binary="$(realpath "$binary")"
[[ -z "$rehearse" || "$device" == cpu ]] || { echo "a rehearsal is on the CPU" >&2; exit 2; }
[[ -n "$rehearse" || "$device" =~ ^cuda:[0-9]+$ ]] || { echo "--device cuda:N" >&2; exit 2; }

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# --- where results go -------------------------------------------------------------------------------------------------

if [[ -z "$commit" ]]; then
    commit="$(git -C "$root" rev-parse --short=9 HEAD 2>/dev/null || cat "$root/COMMIT" 2>/dev/null || echo unknown)"
    [[ -z "$(git -C "$root" status --porcelain -- . ':!benches/results' 2>/dev/null)" ]] || commit+="-changed"
fi
commit="$(tr -cd 'A-Za-z0-9._-' <<< "$commit")"
if [[ -n "$rehearse" ]]; then
    name="CPU, a rehearsal" slug=cpu driver=none folder="$root/target/gpu-rehearsal"
else
    query() { nvidia-smi --id="${device#cuda:}" --query-gpu="$1" --format=csv,noheader; }
    name="$(query name)" || { echo "nvidia-smi shows no GPU ${device#cuda:}; --rehearse needs none" >&2; exit 2; }
    slug="$(tr 'A-Z ' 'a-z-' <<< "$name" | tr -cd 'a-z0-9-')"
    driver="$(query driver_version), $(query memory.total)"
    folder="$root/benches/results"
fi
results="$folder/$(date -u +%Y-%m-%d)-$slug-$commit"
mkdir -p "$results"
page="$results/$mode.md" figures="$results/$mode.jsonl"
[[ -n "$only" ]] || rm -f "$page" "$figures"

# Lines for the page: no path of this machine in them.
write() {
    sed -e "s|$scratch|SCRATCH|g; s|$binary|adfreeze|g; s|$root/||g; s|$root|.|g; s|\(/[^ ]*\)*/compute-sanitizer|compute-sanitizer|g" \
        -e "s|^$python |python3 |; s| $python | python3 |g; s|/[^ ]*/site-packages/||g" | tee -a "$page"
    [[ -z "${OUT:-}" ]] || { mkdir -p "$OUT/${results##*/}" && cp "$results/$mode".* "$OUT/${results##*/}/"; }
}

libraries="not needed"
SANITIZER=""
if [[ -z "$rehearse" ]]; then
    libraries="all found"
    cuda="$("$binary" --version | sed -n 's/.*(CUDA \([0-9]*\).*/\1/p')"
    [[ -n "$cuda" ]] || { echo "$binary was built without the feature cuda" >&2; exit 2; }
    "$root/tools/gpu_libraries.sh" find "$cuda" > "$scratch/found" 2> "$scratch/told" || libraries="$(grep -F 'not found' "$scratch/told" | paste -sd ';')"
    source "$scratch/found"
fi
write <<PAGE
# $mode on $name

| | |
|---|---|
| begun | $(date -u '+%Y-%m-%d %H:%M') UTC |
| driver, memory | $driver |
| commit of the checkout | $commit |
| binary | $("$binary" --version), SHA-256 $(sha256sum < "$binary" | cut -c1-16)… |
| libraries | $libraries |
${only:+| items | $only alone |
}
PAGE
if [[ -z "$rehearse" && "$libraries" != "all found" ]]; then
    write <<< "Nothing was run: a library is missing. \`tools/gpu_libraries.sh fetch DIR\` brings it where there is a network; ADFREEZE_CUDA_LIBS names its folder."
    exit 1
fi

# --- items ------------------------------------------------------------------------------------------------------------

passed=() failed=() left=()

# Is it asked for?
wanted() { [[ -z "$only" || ",$only," == *",$1,"* ]]; }

# leave NAME WHY [EXCUSED]: an item that is not run.
leave() {
    wanted "$1" || return 0
    write <<< $'\n'"## $1"$'\n\n'"Left out: $2."
    [[ -n "${3:-}" ]] || left+=("$1")
}

# item NAME SECONDS COMMAND…: runs it in the scratch folder; what it says goes to the page, and with records=1 its standard
# output to the file of figures.
item() {
    local name="$1" limit="$2" rest=$((total - SECONDS)) log="$scratch/log" begun=$SECONDS out code=0 verdict lines fence
    shift 2
    wanted "$name" || return 0
    if [[ "$rest" -lt 10 ]]; then
        leave "$name" "the call's time is up; \`tools/gpu.sh $mode --only $name\` runs it"
        return
    fi
    [[ "$limit" -lt "$rest" ]] || limit="$rest"
    out="$log"
    [[ -z "${records:-}" ]] || out="$figures"
    : > "$log"
    lines="$(wc -l 2>/dev/null < "$figures" || echo 0)"
    (cd "$scratch" && timeout --kill-after=5 "$limit" bash -euo pipefail -c '"$@"' _ "$@") >> "$out" 2>> "$log" < /dev/null || code=$?
    case "$code" in
        0) verdict=passed; passed+=("$name") ;;
        124 | 137) verdict="FAILED: stopped at its limit of $limit s"; failed+=("$name") ;;
        *) verdict="FAILED with exit code $code"; failed+=("$name") ;;
    esac
    {
        printf '\n## %s\n\n`%s`\n\n%s, %d s\n' "$name" "$*" "$verdict" "$((SECONDS - begun))"
        # What is a Markdown table stays one.
        if [[ -s "$log" ]]; then
            [[ "$(head -c 2 "$log")" == "| " ]] && fence="" || fence='```'
            printf '\n%s\n' "$fence"
            tr '\r' '\n' < "$log" | awk -v most=160 '
                NR <= most / 2 { print; next }
                { tail[NR % (most / 2)] = $0 }
                END { if (NR > most) print "… " NR - most " lines …"
                      for (i = (NR > most ? NR - most / 2 : most / 2) + 1; i <= NR; i++) print tail[i % (most / 2)] }'
            printf '%s\n' "$fence"
        fi
        if [[ -n "${records:-}" && -s "$figures" ]]; then
            echo
            tail -n "+$((lines + 1))" "$figures" | python3 "$root/tools/gpu_figures.py" table || true
        fi
    } | write
}

# A short quickstart that is stopped in its second stage and goes on must leave the bytes of one that is not.
resumed() {
    local run=("$binary" train "$root/recipes/quickstart.toml" --device "$device" --set synth.shapes.n=64)
    run+=(--set stage.align.max_steps=10 --set stage.sft.max_steps=40 --set stage.dpo.max_steps=5)
    for stage in align sft dpo; do run+=(--set "stage.$stage.eval=[]" --set "stage.$stage.batch.global=4"); done
    sums() { (cd "$1/runs/quickstart" && find . -path '*/final/*' -type f -print0 | sort -z | xargs -0 sha256sum); }
    mkdir -p whole stopped
    (cd whole && exec "${run[@]}" > ../whole.log 2>&1) || { cat whole.log; return 1; }
    (cd stopped && exec "${run[@]}" > ../stopped.log 2>&1) &
    local job=$! code=0
    until grep -qs '"stage":"sft","step":5,' stopped/runs/quickstart/metrics.jsonl || ! kill -0 "$job" 2>/dev/null; do sleep 0.005; done
    kill -USR1 "$job" 2>/dev/null || true
    wait "$job" || code=$?
    [[ "$code" == 75 ]] || { cat stopped.log; echo "expected to be stopped with exit code 75, got $code"; return 1; }
    (cd stopped && exec "${run[@]}" >> ../stopped.log 2>&1) || { cat stopped.log; return 1; }
    grep -E "asked to stop|goes on after" stopped.log
    diff <(sums whole) <(sums stopped)
    sums whole | grep -c . | sed 's/$/ files of both runs have the same SHA-256 sums/'
}
# The README's first command, and its figures; a rehearsal makes too few steps to have any.
quickstart() {
    local run=("$binary" train "$root/recipes/quickstart.toml" --device "$device")
    if [[ -n "$rehearse" ]]; then
        "${run[@]}" --set synth.shapes.n=64 --set stage.align.max_steps=2 --set stage.sft.max_steps=2 --set stage.dpo.max_steps=2
        return
    fi
    "${run[@]}"
    python3 "$root/tools/gpu_figures.py" quickstart runs/quickstart >&2
}

export -f resumed quickstart
export binary root device rehearse

# steps WORK: the command of `bench step`; the shapes are the preset's. What the data sheet says is known of these GPUs.
steps() {
    bench=("$binary" bench step --preset "$preset" --random-init --work "$1" --steps 10 --device "$device" --json)
    [[ ! "$slug" =~ h200|h100.*hbm3 ]] || bench+=(--peak 990)
}

# peer WORK: the same work in PyTorch, with the sizes of our last record of it.
peer() {
    local sizes
    sizes="$(python3 "$root/tools/gpu_figures.py" sizes "$2" "$1")"
    echo "llava.py $sizes" >&2
    # shellcheck disable=SC2086 # several arguments
    "$3" "$root/benches/peers/llava.py" --preset "$4" --device "$device" --work "$1" $sizes
}
export -f peer

preset=llava-1.5-7b
[[ -z "$rehearse" ]] || preset=tiny
case "$mode" in
    correct)
        item selftest 60 "$binary" selftest --device "$device"
        [[ -z "$rehearse" ]] || leave poison "kernels alone poison what they will write" "$rehearse"
        [[ -n "$rehearse" ]] || item poison 60 env ADFREEZE_POISON=1 "$binary" selftest --device "$device"
        item resume 60 resumed
        # cuBLAS's own kernels are left out of the search for races; memory is watched in all.
        check=("$SANITIZER" --error-exitcode 9)
        why="${rehearse:+looked for, as there is no GPU}"
        for tool in memcheck racecheck; do
            if [[ -z "$SANITIZER" ]]; then
                leave "$tool" "compute-sanitizer was not ${why:-found}" "$rehearse"
                continue
            fi
            [[ "$tool" == memcheck ]] || check+=(--kernel-name-exclude "regex=cublas|cutlass|xmma|nvjet|gemm|gemv")
            item "$tool" 130 "${check[@]}" --tool "$tool" "$binary" selftest --only ops --device "$device"
        done
        item quickstart 300 quickstart
        ;;
    speed)
        records=1
        item kernels 240 "$binary" bench kernels --device "$device" --json
        for work in align sft dpo; do
            steps "$work"
            item "$work" 80 "${bench[@]}"
        done
        records=""
        item goals 10 python3 "$root/tools/gpu_figures.py" goals "$figures"
        ;;
    peers)
        records=1
        for work in align sft dpo; do
            # Ours, theirs, ours: a machine that slows down or speeds up shows.
            steps "$work"
            item "$work" 90 "${bench[@]}"
            item "$work-peer" 120 peer "$work" "$figures" "$python" "$preset"
            item "$work-again" 90 "${bench[@]}"
        done
        records=""
        item gate 10 python3 "$root/tools/gpu_figures.py" peers "$figures" ${rehearse:+any}
        ;;
esac

{
    printf '\n## Outcome\n\n'
    printf 'Passed: %s\n' "${passed[*]:-none}"
    [[ ${#failed[@]} -eq 0 ]] || printf 'FAILED: %s\n' "${failed[*]}"
    [[ ${#left[@]} -eq 0 ]] || printf 'LEFT OUT: %s\n' "${left[*]}"
    printf 'The call took %d s.\n' "$SECONDS"
} | write
[[ ${#failed[@]} -eq 0 && ${#left[@]} -eq 0 && ${#passed[@]} -gt 0 ]]
