"""`python -m bitspike` is the command `bitspike`."""
from bitspike.cli import main

main()
