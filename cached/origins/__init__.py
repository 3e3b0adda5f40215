"""The origins (L3) that models come from."""
