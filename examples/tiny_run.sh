#!/usr/bin/env bash
# The full circle on two CPU cores, offline: build both stages, train, score before and after, compare, chat.
#
#     examples/tiny_run.sh [FOLDER]        default: out/tiny
#
# The model has 4 layers of width 128 (0.9 M parameters) and a vocabulary of 400. It learns its name, to spell words it never
# saw in training, and to add numbers it never saw by calling the calculator. It is too small to learn facts: demo_choice
# stays at chance.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/tiny}
if [ -e "$out" ]; then
    echo "$out already exists: remove it, or pass another folder" >&2
    exit 1
fi
mkdir -p "$out"
tasks=demo_math,simple_spelling,spelling_bee,demo_choice
words=packages/chatdata/src/chatdata/demo/words.txt

step() { # print the command, run it, print how long it took
    local started=$SECONDS
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
    printf '[%s s]\n' $((SECONDS - started))
}
train() { step uv run chattrain run --device cpu "$@"; }
score() { step uv run chateval run --device cpu --tasks $tasks --words $words --limit 150 --max-new-tokens 200 --batch-size 75 "$@"; }

step uv run chatdata build --stage mid --demo --out "$out/data-mid"
step uv run chatdata build --stage sft --demo --out "$out/data-sft"

train --data "$out/data-mid" --init random:4x128x4 --seq-len 256 --device-batch-size 8 --out "$out/before" --stop-at 0
train --data "$out/data-mid" --init random:4x128x4 --seq-len 256 --device-batch-size 8 --out "$out/mid"
train --data "$out/data-sft" --init "$out/mid" --seq-len 768 --device-batch-size 4 --lr-scale 10 --out "$out/sft"

score --checkpoint "$out/before" --out "$out/scores-before"
score --checkpoint "$out/mid" --out "$out/scores-mid"
score --checkpoint "$out/sft" --out "$out/scores-sft"

step uv run chateval compare "$out/scores-before" "$out/scores-sft" --markdown "$out/before-sft.md"
step uv run chateval compare "$out/scores-mid" "$out/scores-sft" --markdown "$out/mid-sft.md"

step uv run chateval chat --checkpoint "$out/sft" --temperature 0 --say "Spell the word: elephants" \
    --say "/clear" --say "What is your name?" --say "/clear" --say "Ada has 17 shells and finds 38 more. How many shells does Ada have now?"
printf '\nDone in %s s. To keep chatting: uv run chateval chat --checkpoint %s\n' "$SECONDS" "$out/sft"
