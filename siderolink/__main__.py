"""``python -m siderolink``: the command."""

from siderolink.cli import main

if __name__ == "__main__":
    main()
