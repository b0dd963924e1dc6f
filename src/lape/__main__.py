"""`python -m lape` is `lape`."""

from lape.cli.app import main

if __name__ == "__main__":
    main()
