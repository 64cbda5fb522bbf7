"""`python -m smallthinker_edge`: the same as the smallthinker-edge command."""

import sys

from smallthinker_edge.cli import main

sys.exit(main())
