# `just` alone: tests, then lint

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

# docs/commands.md, from the commands themselves
commands:
    uv run python tests/docs/test_commands.py

# both stages of the demo, no download
demo-data:
    uv run --package chatdata chatdata build --stage mid --demo --out out/demo-mid
    uv run --package chatdata chatdata build --stage sft --demo --out out/demo-sft

# the full circle on two CPU cores: build, train, score, compare, chat (under 6 minutes)
demo:
    examples/tiny_run.sh
