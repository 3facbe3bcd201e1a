"""The HTML report of a run: its numbers, the losses of single tokens replayed, and the page that shows both."""
