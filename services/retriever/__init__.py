"""The retriever: queries in, passages out. `index` builds what `serve` answers from."""
