"""A search provider's API instead of a corpus."""
