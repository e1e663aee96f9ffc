"""What other programs load of this project, under a name that is its own: the vLLM plugin (plugin.py)."""
