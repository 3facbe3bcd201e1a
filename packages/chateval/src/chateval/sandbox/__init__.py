"""Run model-written Python in isolation: call run_code.py; the other files build and test the sandbox."""
