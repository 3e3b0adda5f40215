"""The cache within the programs that people run: each integration is loaded by itself, and only when it is used."""
