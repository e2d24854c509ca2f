"""These tests need Triton's interpreter, which a process decides for when it first imports Triton.

`tests/backends/test_triton.py` runs them in processes of their own.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]
