"""Text generation behind one small interface: a transformers engine (anywhere) and a vLLM engine (fast)."""
