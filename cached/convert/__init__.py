"""Pickled checkpoints (.bin, .pt, .pth) to safetensors: read in a sandboxed process, compared, put in place at once."""
