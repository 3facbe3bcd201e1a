#!/usr/bin/env bash
# On one GPU, from the folder that prepare.sh made: is everything equal there, and how fast is it? At most 5 minutes.
#   run.sh [--toy] [PART…]      parts: equality resume speed generation loss (default: all)
# Every part is a process with a time limit and prints its lines as it gets them; the table at the end has them all.
# --toy: small sizes, for a CPU. PYTHON (default: python3) is the one with torch. Nothing is left behind.
set -uo pipefail
toy=; [ "${1:-}" = --toy ] && { toy=--toy; shift; }
here=$(cd "$(dirname "$0")" && pwd) python=${PYTHON:-python3} end=$((SECONDS + 290))
declare -A limits=([equality]=70 [resume]=50 [speed]=140 [generation]=40 [loss]=30)
[ $# -gt 0 ] || set -- equality resume speed generation loss
for name; do [ "${limits[$name]:-}" ] || { echo "Error: no part $name; parts: ${!limits[*]}" >&2; exit 2; }; done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" - "$here/wheels" "$work/site" << 'PYTHON' || exit 1
import importlib.util, pathlib, sys, zipfile

for wheel in pathlib.Path(sys.argv[1]).glob("*.whl"):
    name = wheel.name.split("-")[0]
    if name.startswith("chat") or importlib.util.find_spec(name) is None:  # the machine's own packages come first
        zipfile.ZipFile(wheel).extractall(sys.argv[2])
sys.path.insert(0, sys.argv[2])
needed = ("torch", "numpy", "pyarrow", "tiktoken", "click", "rich", "safetensors", "msgspec")
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    sys.exit(f"Error: {sys.executable} has no {', '.join(missing)}; carry wheels for it in {sys.argv[1]}")
PYTHON
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TMPDIR=$work
export TORCHINDUCTOR_CACHE_DIR=$work/inductor CHATDATA_CACHE=$work/cache # one part's kernels serve the next

for name; do
    left=$((end - SECONDS)) limit=${limits[$name]}
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 10 ]; then
        echo "| $name | no time left | SKIPPED |"
        continue
    fi
    echo "== $name, at most $limit s"
    timeout -k 5 "$limit" "$python" "$here/parts.py" "$name" "$here" --seconds "$limit" $toy \
        || echo "| $name | ended with exit code $? | FAILED |"
done | tee "$work/log"
printf '\n| part | what | result |\n|---|---|---|\n'
grep '^| ' "$work/log"
! grep -qE '(FAILED|SKIPPED) \|$' "$work/log"
