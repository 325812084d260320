"""All that touches vLLM: what its versions have where, one function a fact."""
