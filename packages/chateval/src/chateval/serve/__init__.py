"""Serve a checkpoint to OpenAI clients and browsers: app.py (HTTP) → request.py → batching.py → content.py."""
