"""`python -m ardtrain`: the same command line as `ardtrain`."""

import sys

from ardtrain.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
