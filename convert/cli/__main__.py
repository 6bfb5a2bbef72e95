"""`python -m omni_convert.convert.cli`, where the command `omni-convert` is not on the PATH."""

from omni_convert.convert.cli.main import main

if __name__ == "__main__":
    main()
