"""The stages of the workflow, one file each, and the pure code they call."""
