"""`python -m cqlora VERB …`, the same as the console script."""

from cqlora.cli import main

main()
