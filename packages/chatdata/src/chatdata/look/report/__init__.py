"""The HTML report of a build: numbers, charts, documents and the page that holds them."""
