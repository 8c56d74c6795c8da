"""`python -m largebatch`: the command, for where its script is not on the path, and for `torchrun -m largebatch`."""

from largebatch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
