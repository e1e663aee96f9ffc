"""The stages of the workflow, one file each, and the pure code they call."""

import artifacts  # noqa: F401  (from here on the sources of what is imported are recorded, see artifacts/loaded.py)
