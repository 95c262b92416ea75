"""The program as `python -m dfmspec`."""

from dfmspec.cli.app import main

if __name__ == "__main__":
    main()
