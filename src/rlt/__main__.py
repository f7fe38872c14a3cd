"""`python -m rlt`: the command line from a source tree, where nothing is installed."""

from rlt.cli import main

if __name__ == "__main__":
    main()
