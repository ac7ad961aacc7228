"""``python -m megarewarm COMMAND ...`` is ``megarewarm COMMAND ...``."""

from megarewarm.cli import main

if __name__ == "__main__":
    main()
