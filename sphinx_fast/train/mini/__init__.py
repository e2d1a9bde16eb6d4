"""sphinx-mini, the embedded model, from nothing: `python -m sphinx_fast.train.mini` (docs/mini.md)."""
