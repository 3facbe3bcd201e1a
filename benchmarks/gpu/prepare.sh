#!/usr/bin/env bash
# Puts together what run.sh needs on a GPU machine without network or a clone: wheels, two small builds, the golden model.
#   uv run benchmarks/gpu/prepare.sh [--toy] [OUT]      OUT (default: out/gpu) is at most 40 MiB
# Then copy OUT to the machine and call OUT/run.sh there. It needs Linux, Python 3.11 or newer, torch 2.9 or newer, and
# numpy, pyarrow, tiktoken, click, rich and safetensors. msgspec is carried, for the Python of PYTHON_VERSION (3.12).
# The builds come from the real data that CONTRIBUTING.md names. --toy takes the demo instead, to try the scripts out.
set -euo pipefail
toy=; [ "${1:-}" = --toy ] && { toy=1; shift; }
root=$(cd "$(dirname "$0")/../.." && pwd) out=${1:-out/gpu}
shared=${CHATDATA_SHARED:-$root/../shared} data=$shared/data

[ ! -e "$out" ] || { echo "Error: $out: already exists; choose another OUT, or remove it" >&2; exit 1; }
mkdir -p "$out"
trap '[ $? = 0 ] || rm -rf "$out"' EXIT
out=$(cd "$out" && pwd)
(cd "$root" && "${UV:-uv}" build -q --all-packages --wheel --out-dir "$out/wheels")
if [ $toy ]; then
    for stage in mid sft; do
        chatdata build --stage "$stage" --demo --limit 40 --workers 1 --decontaminate off --json --out "$out/$stage"
    done > /dev/null
else
    "${UV:-uv}" run -q --with pip python -m pip download -q --no-deps --only-binary=:all: --dest "$out/wheels" \
        --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 msgspec
    for stage in mid sft; do
        chatdata build --recipe "$root/tests/chatdata/recipes/golden_$stage.toml" --data-dir "$data/hub" --limit 3000 \
            --tokenizer "$data/tokenizer/tokenizer.pkl" --words "$data/words_alpha.txt" \
            --identity "$data/identity_conversations.jsonl" --decontaminate off --json --out "$out/$stage"
    done > /dev/null
fi
if [ -d "$shared/golden" ]; then mkdir "$out/golden" && cp "$shared"/golden/model_tiny* "$out/golden"; fi
rm -f "$out/wheels/.gitignore"
cp "$root"/benchmarks/gpu/{run.sh,parts.py} "$out"
kib=$(du -sk "$out" | cut -f1)
[ "$kib" -le 40960 ] || { echo "Error: $out: $kib KiB, more than 40 MiB" >&2; exit 1; }
echo "$out: $((kib / 1024)) MiB; copy it to the GPU machine and call run.sh there"
