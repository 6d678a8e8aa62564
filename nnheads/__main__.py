"""``python -m nnheads``: the same as the ``nnheads`` program."""

from nnheads.cli.main import main

if __name__ == "__main__":
    main()
