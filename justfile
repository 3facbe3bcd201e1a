# `just` without arguments runs the tests, then the linters

default: test lint

test *arguments:
    uv run pytest -n 2 --dist worksteal {{arguments}}

lint:
    uv run ruff check .
    uv run ruff format --check .
    uv run mypy
    uv run lint-imports --no-logo

format:
    uv run ruff check --fix .
    uv run ruff format .

# write docs/commands.md from --help
commands:
    uv run python tests/docs/test_commands.py

# build both stages of the demo; nothing is downloaded
demo-data:
    uv run --package chatdata chatdata build --stage mid --demo --out out/demo-mid
    uv run --package chatdata chatdata build --stage sft --demo --out out/demo-sft

# build, train, score, compare and chat on two CPU cores
demo:
    examples/tiny_run.sh
