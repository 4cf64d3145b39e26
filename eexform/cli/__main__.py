"""``python -m eexform.cli``."""

from eexform.cli.app import main

if __name__ == "__main__":
    main()
