"""`python -m lape` is `lape`."""

from lape.cli import main

if __name__ == "__main__":
    main()
