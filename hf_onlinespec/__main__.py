"""`python -m hf_onlinespec`: the command line."""

import sys

from hf_onlinespec_cli import main

sys.exit(main())
