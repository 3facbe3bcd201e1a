"""The demo: its texts, recipes and tokenizer. Nothing is downloaded."""
