"""What the files of this folder share: the repository on the path, and the tiny models and data of test_mdpo.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_mdpo import bunny, folder, llava  # noqa: E402, F401
