"""`python -m kvferry`: the `kvferry` command."""

from kvferry.cli.main import main

if __name__ == "__main__":
    main()
