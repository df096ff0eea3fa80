"""`python -m odenets`: the same as the console scripts `odenets` and `lightning`."""

from odenets.cli import main

if __name__ == "__main__":
    main()
