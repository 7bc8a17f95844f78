"""`python -m prosparse_pipe` is the same as `prosparse-pipe`."""

from prosparse_pipe.cli import main

if __name__ == "__main__":
    main()
