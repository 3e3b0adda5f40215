"""Code generated from ``proto/cached/v1/cached.proto``. Do not edit: ``make proto`` writes it."""
