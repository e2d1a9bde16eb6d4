"""`python -m sphinx_fast.train.mini`."""

from sphinx_fast.train.mini.recipe import main

if __name__ == "__main__":
    main()
