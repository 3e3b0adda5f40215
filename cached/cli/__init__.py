"""The `cached` command."""
