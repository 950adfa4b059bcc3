"""`python -m context_diffusion` is the command line."""

from context_diffusion.cli.main import main

main()
