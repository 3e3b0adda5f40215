"""Metrics, health and the HTTP endpoints."""
