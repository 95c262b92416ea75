"""The program as `python -m dfmspec`."""

import sys

if __name__ == "__main__":
    # -m puts the working directory first, where a file of the user's may have the name of a package.
    if not sys.flags.safe_path:
        sys.path.pop(0)

    from dfmspec.cli.app import program

    program()
