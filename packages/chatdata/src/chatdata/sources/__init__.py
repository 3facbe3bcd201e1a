"""Where rows come from: files, Hub datasets and generators, and the texts a tokenizer is trained on."""
