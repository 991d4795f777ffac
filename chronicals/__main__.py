"""`python -m chronicals` is `chronicals`."""

from chronicals.cli import main

main()
