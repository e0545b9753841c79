"""`python -m langmill`, and what torchrun starts."""

from langmill.cli import main

if __name__ == "__main__":
    main()
