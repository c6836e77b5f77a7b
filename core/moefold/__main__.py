"""`python -m moefold` is the command `moefold`."""

from moefold.cli import main

main()
